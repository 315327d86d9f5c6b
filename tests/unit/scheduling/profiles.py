"""Measured stage times, for tests of decisions that rest on them."""

from bisect import bisect_left
from typing import NamedTuple

from gllm_ray.scheduling.load import StepLoad


class ProfileCost(NamedTuple):
    """A table of times of the whole model, linear between its points and beyond the last.

    Like any measurement it may fall where the load grows, by a little and in steps.

    Attributes:
        times: Milliseconds for so many tokens, no context read.
        num_stages: Stages that share the model evenly.
        context_time: Milliseconds in which a stage reads the KV of one token.
    """

    times: dict[float, float]
    num_stages: int = 4
    context_time: float = 0.0

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def tile(self) -> int:
        return 128

    def stage_time(self, load: StepLoad) -> float:
        sizes = list(self.times)
        size = max(load.num_tokens, sizes[0])
        if size > sizes[-1]:
            time = self.times[sizes[-1]] * size / sizes[-1]
        else:
            upper = sizes[bisect_left(sizes, size)]
            lower = sizes[max(0, bisect_left(sizes, size) - 1)]
            part = (size - lower) / max(1, upper - lower)
            time = self.times[lower] + part * (self.times[upper] - self.times[lower])
        return time / self.num_stages + self.context_time * load.num_context_tokens

    def observe(self, load: StepLoad, time_s: float) -> None:
        raise AssertionError("no policy measures")


# Points of the profiles released with TD-Pipe (github.com/MLSysU/TD-Pipe at c8c5316, Apache-2.0):
# whole models on one L20.
_PROFILES = """
    tokens     1   16    32    64    85    96   128   160   180   192   256   320   512  1024   2048
    13b     35.3 37.8  45.1  43.9  45.2  46.8  47.8  69.0  69.6  69.3  70.0  95.1 131.7 258.5  508.7
    32b     85.5 90.6 109.4 103.9 116.0 117.3 116.5 152.9 153.9 155.1 155.9 236.4 313.5 596.8 1207.7
"""
_SIZES, _13B, _32B = (tuple(map(float, row.split()[1:])) for row in _PROFILES.split("\n")[1:4])
L20_LLAMA_13B = ProfileCost(dict(zip(_SIZES, _13B, strict=True)))
L20_QWEN_32B = ProfileCost(dict(zip(_SIZES, _32B, strict=True)))
# KV bytes of a token; an L20 reads 864e6 bytes a millisecond, and three quarters of that in use.
L20_LLAMA_13B_WITH_CONTEXT = L20_LLAMA_13B._replace(context_time=819_200 / (4 * 0.75 * 864e6))
L20_QWEN_32B_WITH_CONTEXT = L20_QWEN_32B._replace(context_time=262_144 / (4 * 0.75 * 864e6))
