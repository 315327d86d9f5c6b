"""The options of each output-length predictor: what `scheduler.length_predictor` may hold."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gllm_ray.strict_schema import StrictModel


class StatisticsPredictorConfig(StrictModel):
    """The mean of similar requests that have ended."""

    name: Literal["statistics"] = Field(
        default="statistics",
        description="What predicts output lengths, for `temporal`: statistics of requests that "
        "have ended, only the hint of each request, or a trained classifier; "
        "`length_predictor: <name>` is short.",
    )


class HintPredictorConfig(StrictModel):
    """Only the hint that a request may bring, which wins over any other prediction too."""

    name: Literal["hint"] = Field(default="hint", description="The predictor.")


class ClassifierPredictorConfig(StrictModel):
    """A classifier trained from a log."""

    name: Literal["classifier"] = Field(default="classifier", description="The predictor.")
    path: str = Field(
        min_length=1,
        description="What `gllm-ray train-lengths` wrote, on the node of the replica, or "
        "`package://<package>/<file>`.",
    )


def _expand_name(value: object) -> object:
    """`hint` is short for a mapping with that name."""
    return {"name": value} if isinstance(value, str) else value


LengthPredictorConfig = Annotated[
    StatisticsPredictorConfig | HintPredictorConfig | ClassifierPredictorConfig,
    Field(discriminator="name"),
    BeforeValidator(_expand_name),
]
