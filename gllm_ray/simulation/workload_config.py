"""The options of a workload: which requests come, how long they are, and when."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gllm_ray.simulation.length_config import MAX_LENGTH, LengthsConfig
from gllm_ray.strict_schema import StrictModel

# What takes hours to simulate, and gigabytes.
_MAX_REQUESTS = 10_000_000
_MAX_PREFIXES = 1_000_000
# One request in eleven days, and more than a thousand replicas serve.
_MIN_RATE_PER_S = 1e-6
_MAX_RATE_PER_S = 1e6
_MIN_REQUESTS_OF_ROUND = 0.001  # or drawing a request takes thousands of rounds

_Rate = Annotated[float, Field(ge=_MIN_RATE_PER_S, le=_MAX_RATE_PER_S)]


class PoissonArrivalsConfig(StrictModel):
    """Requests that know nothing of each other."""

    model_config = ConfigDict(
        json_schema_extra={
            "allowed": f"a rate from {_MIN_RATE_PER_S:g} to {_MAX_RATE_PER_S:g} requests a second, "
            "or a mapping"
        }
    )

    name: Literal["poisson"] = Field(
        default="poisson", description="When requests come; a number is a poisson rate_per_s."
    )
    rate_per_s: _Rate = Field(description="Requests a second on average.")

    @property
    def mean_rate_per_s(self) -> float:
        """Requests a second on average."""
        return self.rate_per_s


class GammaArrivalsConfig(StrictModel):
    """Gaps drawn from a gamma distribution."""

    name: Literal["gamma"] = Field(default="gamma", description="When requests come.")
    rate_per_s: _Rate = Field(description="Requests a second on average.")

    shape: float = Field(
        ge=0.001,
        le=1000,
        description="Below 1 they come in bursts, 1 is poisson, above 1 they come evenly; the "
        "coefficient of variation of the gaps is shape ** -0.5.",
    )

    @property
    def mean_rate_per_s(self) -> float:
        """Requests a second on average."""
        return self.rate_per_s


class ArrivalStage(StrictModel):
    """A time with a rate of its own."""

    duration_s: float = Field(gt=0, description="Seconds the stage lasts.")
    rate_per_s: float = Field(
        ge=0, le=_MAX_RATE_PER_S, description="Requests a second on average; may be 0."
    )


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
        if self._num_requests_of_round < _MIN_REQUESTS_OF_ROUND:
            raise ValueError(
                f"stages=[...]: bring {self._num_requests_of_round:g} requests a round; must bring "
                f"{_MIN_REQUESTS_OF_ROUND:g} or more, by longer stages or higher rates"
            )
        return self

    @property
    def _num_requests_of_round(self) -> float:
        return sum(stage.duration_s * stage.rate_per_s for stage in self.stages)

    @property
    def mean_rate_per_s(self) -> float:
        """Requests a second on average."""
        return self._num_requests_of_round / sum(stage.duration_s for stage in self.stages)

    def at_rate(self, factor: float) -> Self:
        """The same stages, each with `factor` times its rate."""
        stages = tuple(
            stage.model_copy(update={"rate_per_s": factor * stage.rate_per_s})
            for stage in self.stages
        )
        return self.model_copy(update={"stages": stages})


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


class SharedPrefixesConfig(StrictModel):
    """Prompts that begin like others, such as with one of several system prompts."""

    count: int = Field(ge=1, le=_MAX_PREFIXES, description="Different prefixes.")
    tokens: int = Field(ge=1, le=MAX_LENGTH, description="Length of each, put before the prompt.")
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

    num_requests: int | None = Field(
        default=None, ge=1, le=_MAX_REQUESTS, description="Stop after this many."
    )
    duration_s: float | None = Field(
        default=None, gt=0, description="Leave out what comes later, in seconds of the simulation."
    )
    rate_scale: float = Field(
        default=1.0,
        ge=_MIN_RATE_PER_S,
        le=_MAX_RATE_PER_S,
        description="How many times as fast requests come: all arrival times are divided by it.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Output tokens that clients allow, at which longer outputs are cut; null: "
        "exactly the length of the output, so that the scheduler knows it.",
    )
    hint_sigma: float | None = Field(
        default=None,
        ge=0,
        le=3,
        description="Standard deviation of the natural logarithm of what clients say beforehand of "
        "the length of an output, over its length; 0: they know it, null: they say nothing.",
    )


class SyntheticWorkloadConfig(_AnyWorkloadConfig):
    """Requests drawn from distributions."""

    name: Literal["synthetic"] = Field(
        default="synthetic", description="Whether requests are drawn or read from a trace."
    )
    arrivals: ArrivalsConfig = Field(description="When requests come.")
    lengths: LengthsConfig = Field(
        description="How long prompts and outputs are; text is a dataset for both."
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
        self.check_number()
        return self

    def check_number(self) -> None:
        """Refuse a duration in which too many requests come.

        Raises:
            ValueError: They are too many.
        """
        arrivals, duration_s = self.arrivals, self.duration_s
        if self.num_requests is not None or isinstance(arrivals, AtOnceArrivalsConfig):
            return
        assert duration_s is not None
        expected = duration_s * arrivals.mean_rate_per_s * self.rate_scale
        if expected > _MAX_REQUESTS:
            raise ValueError(
                f"duration_s={duration_s:g}: about {expected:.3g} requests come in it; must be at "
                f"most {_MAX_REQUESTS}: shorten it, lower the rate, or give num_requests"
            )


class TraceWorkloadConfig(_AnyWorkloadConfig):
    """Requests read from a file."""

    name: Literal["trace"] = Field(default="trace", description="The workload.")
    path: str = Field(
        min_length=1,
        description="A .csv with arrived_at, num_prefill_tokens and num_decode_tokens or with "
        "TIMESTAMP, ContextTokens and GeneratedTokens; or a .jsonl of simulated requests. Dates, "
        "and seconds from 1e8 on, are counted from the first request.",
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
