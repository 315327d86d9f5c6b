"""The options of prompt and output lengths."""

from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gllm_ray.strict_schema import StrictModel

Dataset = Literal[
    "sharegpt", "sharegpt_8k", "azure_conversation", "azure_code", "arxiv_summarization"
]
_NAMES = ", ".join(get_args(Dataset))
# Datasets that were cut, and the most tokens that prompt and output together have in each.
_MAX_TOTAL_TOKENS = {"sharegpt_8k": 8192, "arxiv_summarization": 16384}
# Longer than any model takes, and a prompt of it still fits into memory.
MAX_LENGTH = 2**24
_LENGTH = (
    f"a number of tokens from 1 to {MAX_LENGTH}, a dataset ({_NAMES}), or a mapping whose name is "
    "dataset, fixed, uniform or lognormal"
)


class _AnyLengthConfig(StrictModel):
    model_config = ConfigDict(json_schema_extra={"allowed": _LENGTH})


class DatasetLengthConfig(_AnyLengthConfig):
    """Lengths as in a public dataset."""

    name: Literal["dataset"] = Field(
        default="dataset",
        description="How lengths are drawn; text is a dataset, a number a fixed length.",
    )
    dataset: Dataset = Field(description="Whose published statistics the lengths have.")


class FixedLengthConfig(_AnyLengthConfig):
    """Every length the same."""

    name: Literal["fixed"] = Field(default="fixed", description="How lengths are drawn.")
    tokens: int = Field(ge=1, le=MAX_LENGTH, description="The length.")


class UniformLengthConfig(_AnyLengthConfig):
    """Every length of a range as likely as any other."""

    name: Literal["uniform"] = Field(default="uniform", description="How lengths are drawn.")
    min_tokens: int = Field(ge=1, description="Shortest.")
    max_tokens: int = Field(ge=1, le=MAX_LENGTH, description="Longest.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}: must be <= max_tokens={self.max_tokens}"
            )
        return self


class LognormalLengthConfig(_AnyLengthConfig):
    """Lengths whose logarithm is normally distributed."""

    name: Literal["lognormal"] = Field(default="lognormal", description="How lengths are drawn.")
    median_tokens: float = Field(ge=1, description="Half are shorter, before `max_tokens`.")
    sigma: float = Field(
        ge=0,
        le=10,
        description="Standard deviation of the natural logarithm; the mean is median_tokens "
        "* exp(sigma ** 2 / 2).",
    )
    max_tokens: int = Field(ge=1, le=MAX_LENGTH, description="Longer ones are drawn again.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.median_tokens > self.max_tokens:
            raise ValueError(
                f"median_tokens={self.median_tokens:g}: must be <= max_tokens={self.max_tokens}"
            )
        return self


def _expand_length(value: object) -> object:
    """A number is a fixed length, and text is a dataset."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"name": "fixed", "tokens": value}
    return {"name": "dataset", "dataset": value} if isinstance(value, str) else value


LengthConfig = Annotated[
    DatasetLengthConfig | FixedLengthConfig | UniformLengthConfig | LognormalLengthConfig,
    Field(discriminator="name", json_schema_extra={"allowed": _LENGTH}),
    BeforeValidator(_expand_length),
]


class LengthsConfig(StrictModel):
    """Prompt and output lengths, drawn independently of each other."""

    model_config = ConfigDict(
        json_schema_extra={"allowed": f"a dataset ({_NAMES}), or a mapping of prompt and output"}
    )

    prompt: LengthConfig = Field(description="Prompt tokens, a shared prefix left out.")
    output: LengthConfig = Field(description="Output tokens.")
    max_total_tokens: int | None = Field(
        default=None,
        ge=2,
        description="A prompt and its output that are longer together shrink in proportion.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        """A dataset's name is short for its prompts, its outputs, and the length it was cut to."""
        if not isinstance(value, str):
            return value
        return {
            "prompt": value,
            "output": value,
            "max_total_tokens": _MAX_TOTAL_TOKENS.get(value),
        }
