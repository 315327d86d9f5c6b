"""The files that measured stage times come in."""

import csv
import json
from io import StringIO
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.strict_schema import StrictModel, parse_strictly

PREFILL_HEADER = ["Total Length", "Execute Time"]

_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(gt=0)]


class StageSample(StrictModel):
    """One micro-batch, and how long each stage took for it."""

    num_decodes: _Count
    num_context_tokens: _Count
    num_prefill_tokens: _Count
    num_attention_pairs: _Count
    stage_times_s: list[_Seconds] = Field(min_length=1)

    @property
    def load(self) -> StepLoad:
        """What the stages computed."""
        return StepLoad(
            self.num_decodes,
            self.num_context_tokens,
            self.num_prefill_tokens,
            self.num_attention_pairs,
        )


class StageProfile(StrictModel):
    """Stage times measured on a running pipeline; the schema of the file that holds them.

    Attributes:
        format: Changes with the meaning of what follows.
        provenance: What was measured, where and how.
        layers: Decoder layers of each stage that was measured.
        samples: In any order; a load may be measured several times.
    """

    format: Literal["gllm_ray.stage_profile.v1"]
    provenance: str = Field(min_length=1)
    layers: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    samples: list[StageSample] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = {len(sample.stage_times_s) for sample in self.samples}
        if counts != {len(self.layers)}:
            raise ValueError(
                f"samples: must have {len(self.layers)} stage_times_s each, one for each of layers="
                f"{self.layers}, not {', '.join(map(str, sorted(counts)))}"
            )
        return self


def parse_stage_profile(text: str) -> StageProfile:
    """Read a stage profile from JSON.

    Raises:
        ConfigError: The text is no such file; one line for each mistake.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None
    return parse_strictly(StageProfile, data)


def parse_prefill_times(text: str) -> list[tuple[int, float]]:
    """Read the times of whole-model prefills from CSV, in the format of TD-Pipe's profiles.

    Args:
        text: The header `Total Length,Execute Time`, then tokens and milliseconds, tokens rising.

    Returns:
        Tokens and seconds.

    Raises:
        ConfigError: The text is no such file; the message names the line.
    """
    lines = csv.reader(StringIO(text))
    header = next(lines, [])
    if header != PREFILL_HEADER:
        raise ConfigError(f"line 1: {header}; must be the header {PREFILL_HEADER}")
    points: list[tuple[int, float]] = []
    for number, line in enumerate(lines, start=2):
        try:
            tokens, milliseconds = line
            point = int(tokens), float(milliseconds) / 1000
        except ValueError:
            raise ConfigError(
                f"line {number}: {line}; must be a number of tokens and milliseconds"
            ) from None
        if point[0] <= (points[-1][0] if points else 0) or not 0 < point[1] < float("inf"):
            raise ConfigError(
                f"line {number}: {line}; tokens must rise from at least 1, and the time must be "
                "above 0"
            )
        points.append(point)
    if not points:
        raise ConfigError("no line after the header; must be at least one")
    return points
