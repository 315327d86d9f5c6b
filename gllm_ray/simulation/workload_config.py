"""The options of a workload: which requests come, how long they are, and when."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from gllm_ray.strict_schema import StrictModel

Dataset = Literal[
    "sharegpt", "sharegpt_8k", "azure_conversation", "azure_code", "arxiv_summarization"
]
_DATASETS = ", ".join(get_args(Dataset))
# Datasets that were cut, so that prompt and output together have at most so many tokens.
_MAX_TOTAL_TOKENS = {"sharegpt_8k": 8192, "arxiv_summarization": 16384}


class PoissonArrivalsConfig(StrictModel):
    """Requests that know nothing of each other."""

    name: Literal["poisson"] = Field(
        default="poisson", description="When requests come; a number is a poisson rate_per_s."
    )
    rate_per_s: float = Field(gt=0, description="Requests a second on average.")


class GammaArrivalsConfig(StrictModel):
    """Gaps drawn from a gamma distribution."""

    name: Literal["gamma"] = Field(default="gamma", description="When requests come.")
    rate_per_s: float = Field(gt=0, description="Requests a second on average.")
    shape: float = Field(
        gt=0,
        description="Below 1 they come in bursts, 1 is poisson, above 1 they come evenly; the "
        "coefficient of variation of the gaps is shape ** -0.5.",
    )


class ArrivalStage(StrictModel):
    """A time with a rate of its own."""

    duration_s: float = Field(gt=0, description="Seconds the stage lasts.")
    rate_per_s: float = Field(ge=0, description="Requests a second on average; may be 0.")


class StagedArrivalsConfig(StrictModel):
    """A Poisson process whose rate changes from stage to stage."""

    name: Literal["staged"] = Field(default="staged", description="When requests come.")
    stages: Annotated[tuple[ArrivalStage, ...], Field(strict=False, min_length=1)] = Field(
        description="One after the other, and again from the first after the last."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(stage.rate_per_s for stage in self.stages):
            raise ValueError("stages=[...]: must have a rate_per_s > 0 in one of them")
        return self


class AtOnceArrivalsConfig(StrictModel):
    """An offline batch: all requests are there at the start."""

    name: Literal["at_once"] = Field(default="at_once", description="When requests come.")


class RecordedArrivalsConfig(StrictModel):
    """The arrival times that stand in the trace."""

    name: Literal["recorded"] = Field(default="recorded", description="When requests come.")


def _expand_arrivals(value: object) -> object:
    """A number is a Poisson rate, and a name is short for a mapping with that name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"name": "poisson", "rate_per_s": value}
    return {"name": value} if isinstance(value, str) else value


ArrivalsConfig = Annotated[
    PoissonArrivalsConfig | GammaArrivalsConfig | StagedArrivalsConfig | AtOnceArrivalsConfig,
    Field(discriminator="name"),
    BeforeValidator(_expand_arrivals),
]
TraceArrivalsConfig = Annotated[
    RecordedArrivalsConfig
    | PoissonArrivalsConfig
    | GammaArrivalsConfig
    | StagedArrivalsConfig
    | AtOnceArrivalsConfig,
    Field(discriminator="name"),
    BeforeValidator(_expand_arrivals),
]


class DatasetLengthConfig(StrictModel):
    """Lengths as in a public dataset."""

    name: Literal["dataset"] = Field(
        default="dataset",
        description="How lengths are drawn; text is a dataset, a number a fixed length.",
    )
    dataset: Dataset = Field(description="Whose published statistics the lengths have.")


class FixedLengthConfig(StrictModel):
    """Every length the same."""

    name: Literal["fixed"] = Field(default="fixed", description="How lengths are drawn.")
    tokens: int = Field(ge=1, description="The length.")


class UniformLengthConfig(StrictModel):
    """Every length of a range as likely as any other."""

    name: Literal["uniform"] = Field(default="uniform", description="How lengths are drawn.")
    min_tokens: int = Field(ge=1, description="Shortest.")
    max_tokens: int = Field(ge=1, description="Longest.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}: must be <= max_tokens={self.max_tokens}"
            )
        return self


class LognormalLengthConfig(StrictModel):
    """Lengths whose logarithm is normally distributed."""

    name: Literal["lognormal"] = Field(default="lognormal", description="How lengths are drawn.")
    median_tokens: float = Field(ge=1, description="Half are shorter.")
    sigma: float = Field(
        ge=0,
        description="Standard deviation of the natural logarithm; the mean is median_tokens "
        "* exp(sigma ** 2 / 2).",
    )
    max_tokens: int = Field(ge=1, description="Longer ones are drawn again.")

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
    Field(discriminator="name"),
    BeforeValidator(_expand_length),
]


_LENGTH = (
    f"a number of tokens >= 1, a dataset ({_DATASETS}), or a mapping whose name is dataset, fixed, "
    "uniform or lognormal"
)


class LengthsConfig(StrictModel):
    """Prompt and output lengths, drawn independently of each other."""

    prompt: LengthConfig = Field(
        description="Prompt tokens, a shared prefix left out.",
        json_schema_extra={"allowed": _LENGTH},
    )
    output: LengthConfig = Field(
        description="Output tokens.", json_schema_extra={"allowed": _LENGTH}
    )
    max_total_tokens: int | None = Field(
        default=None,
        ge=2,
        description="A prompt and its output that are longer together shrink in proportion.",
    )


def _expand_dataset(value: object) -> object:
    """A dataset's name is short for its prompts, its outputs, and the length it was cut to."""
    if not isinstance(value, str):
        return value
    return {
        "prompt": value,
        "output": value,
        "max_total_tokens": _MAX_TOTAL_TOKENS.get(value),
    }


class SharedPrefixesConfig(StrictModel):
    """Prompts that begin like others, such as with one of several system prompts."""

    count: int = Field(ge=1, description="Different prefixes.")
    tokens: int = Field(ge=1, description="Length of each, put before the prompt.")
    zipf_exponent: float = Field(
        default=1.0,
        ge=0,
        description="The k-th most popular prefix has a share in proportion to k ** -zipf_exponent;"
        " 0: all are as popular.",
    )


class TenantConfig(StrictModel):
    """Who sends a share of the requests."""

    name: str = Field(min_length=1, description="The tenant.")
    share: float = Field(default=1.0, gt=0, description="Of the requests, relative to the others.")
    priority: int = Field(default=0, description="Of the tenant's requests; lower is first.")


class _AnyWorkloadConfig(StrictModel):
    """What every workload has."""

    num_requests: int | None = Field(default=None, ge=1, description="Stop after so many requests.")
    duration_s: float | None = Field(
        default=None, gt=0, description="Leave out what comes later, in seconds of the simulation."
    )
    rate_scale: float = Field(
        default=1.0,
        gt=0,
        description="Requests come so many times as fast: all arrival times are divided by it.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Output tokens that clients allow, at which longer outputs are cut; null: "
        "exactly the length of the output, so that the scheduler knows it.",
    )


class SyntheticWorkloadConfig(_AnyWorkloadConfig):
    """Requests drawn from distributions."""

    name: Literal["synthetic"] = Field(
        default="synthetic", description="Whether requests are drawn or read from a trace."
    )
    arrivals: ArrivalsConfig = Field(description="When requests come.")
    lengths: Annotated[LengthsConfig, BeforeValidator(_expand_dataset)] = Field(
        description="How long prompts and outputs are; text is a dataset for both.",
        json_schema_extra={"allowed": f"a dataset ({_DATASETS}), or a mapping"},
    )
    shared_prefixes: SharedPrefixesConfig | None = Field(
        default=None, description="null: no two prompts begin alike."
    )
    tenants: Annotated[tuple[TenantConfig, ...], Field(strict=False)] = Field(
        default=(), description="Each request is one of theirs, drawn by share; empty: nobody's."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_requests is None and isinstance(self.arrivals, AtOnceArrivalsConfig):
            raise ValueError("num_requests=null: must be given when arrivals is at_once")
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("num_requests=null: must be given when duration_s is not")
        return self


class TraceWorkloadConfig(_AnyWorkloadConfig):
    """Requests read from a file."""

    name: Literal["trace"] = Field(default="trace", description="The workload.")
    path: str = Field(
        min_length=1,
        description="A .csv with arrived_at, num_prefill_tokens and num_decode_tokens or with "
        "TIMESTAMP, ContextTokens and GeneratedTokens; or a .jsonl of simulated requests.",
    )
    arrivals: TraceArrivalsConfig = Field(
        default=RecordedArrivalsConfig(),
        description="When requests come; recorded: as the trace says, otherwise only its lengths "
        "are used, in its order.",
    )
    start_s: float = Field(
        default=0.0, ge=0, description="Begin at this time of the trace, which becomes 0."
    )
    end_s: float | None = Field(
        default=None, gt=0, description="End before this time of the trace; null: at its end."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.path.endswith((".csv", ".jsonl")):
            raise ValueError(f"path={self.path!r}: must end in .csv or .jsonl")
        if not isinstance(self.arrivals, RecordedArrivalsConfig):
            for key in ("start_s", "end_s"):
                if key in self.model_fields_set:
                    raise ValueError(
                        f"{key}={getattr(self, key)}: must be left out when arrivals is "
                        f"{self.arrivals.name}"
                    )
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s={self.end_s:g}: must be > start_s={self.start_s:g}")
        return self


def _default_name(value: Any) -> Any:  # noqa: ANN401
    return {"name": "synthetic"} | value if isinstance(value, dict) else value


WorkloadConfig = Annotated[
    SyntheticWorkloadConfig | TraceWorkloadConfig,
    Field(discriminator="name"),
    BeforeValidator(_default_name),
]
