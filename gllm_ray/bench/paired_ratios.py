"""The ratios of two services that were measured in turns, pair by pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.request_run import RequestRun


class Pair(NamedTuple):
    """The same requests on two services, one right after the other."""

    a: RequestRun
    b: RequestRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A figure of A over that of B.

    Attributes:
        pairs: Of each pair; None, if one of the two failed requests or has no such figure.
        median: Of those that are known; None: none is.
        least: The smallest of them.
        most: The greatest of them.
    """

    pairs: tuple[float | None, ...]
    median: float | None
    least: float | None
    most: float | None

    @classmethod
    def of(cls, pairs: Sequence[float | None]) -> "Ratio":
        """Summarize the ratios of pairs."""
        known = [ratio for ratio in pairs if ratio is not None]
        if not known:
            return cls(pairs=tuple(pairs), median=None, least=None, most=None)
        return cls(pairs=tuple(pairs), median=median(known), least=min(known), most=max(known))


_FIGURES: dict[str, Callable[[RequestFigures], float]] = {
    "requests_per_s": lambda figures: figures.requests_per_s,
    "output_tokens_per_s": lambda figures: figures.output_tokens_per_s,
    "goodput_per_s": lambda figures: figures.goodput_per_s,
    "ttft_p50_s": lambda figures: figures.ttft_s.p50,
    "ttft_p99_s": lambda figures: figures.ttft_s.p99,
    "tpot_p50_s": lambda figures: figures.tpot_s.p50,
    "tpot_p99_s": lambda figures: figures.tpot_s.p99,
    "itl_p50_s": lambda figures: figures.itl_s.p50,
    "itl_p99_s": lambda figures: figures.itl_s.p99,
    "e2e_p50_s": lambda figures: figures.e2e_s.p50,
    "e2e_p99_s": lambda figures: figures.e2e_s.p99,
}


def paired_ratios(pairs: Sequence[Pair]) -> dict[str, Ratio]:
    """Of each figure, and of the CPU seconds of each service in its own runs.

    A run that failed requests had less to do than its peer, so its pair has no ratios.
    """
    figures = {
        name: [(figure(pair.a.figures), figure(pair.b.figures)) for pair in pairs]
        for name, figure in _FIGURES.items()
    }
    figures["cpu_s"] = [
        (pair.a.conditions.cpu_s.get("a", 0.0), pair.b.conditions.cpu_s.get("b", 0.0))
        for pair in pairs
    ]
    return {
        name: Ratio.of([_ratio(*each, pair) for each, pair in zip(values, pairs, strict=True)])
        for name, values in figures.items()
    }


def _ratio(a: float, b: float, pair: Pair) -> float | None:
    is_fair = not pair.a.figures.num_failed and not pair.b.figures.num_failed
    return a / b if is_fair and a > 0 and b > 0 else None
