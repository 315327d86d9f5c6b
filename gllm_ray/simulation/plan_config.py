"""The schema of a plan: a model, GPUs that may be rented, a workload, an SLO, what to search."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gllm_ray.errors import ConfigError
from gllm_ray.model.architectures import refusal_reason
from gllm_ray.policy_config import BalancedConfig, PolicyConfig
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.model_shape import ModelShape
from gllm_ray.simulation.workload_config import TraceWorkloadConfig, WorkloadConfig
from gllm_ray.strict_schema import StrictModel, parse_strictly
from gllm_ray.strict_yaml import read_yaml, refuse_other_kind

Counts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=256)], ...], Field(strict=False, min_length=1)
]
LayerPlan = Annotated[
    Literal["auto", "even"] | tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class PlannedModelConfig(StrictModel):
    """Which model; the plan reads its shape, the service its weights."""

    path: str = Field(
        min_length=1, description="What the service loads: its `model.path`, for the file."
    )
    config: str | dict[str, Any] = Field(
        description="A Hugging Face config.json, or what one holds."
    )
    max_model_len: int = Field(
        ge=1, description="Prompt and output tokens of a sequence; one must fit."
    )

    def shape(self) -> ModelShape:
        """The model's shape.

        Raises:
            ConfigError: The file cannot be read, or the architecture is not known.
        """
        return parse_model_shape(self._config_json())

    def check_served(self) -> None:
        """Refuse a model that the service would refuse.

        Raises:
            ConfigError: The file cannot be read, or the architecture is not served.
        """
        config = self._config_json()
        model_type = str(config.get("model_type"))
        if reason := refusal_reason(model_type, config):
            raise ConfigError(
                f"model.config: model_type {model_type!r} cannot be planned for, as the service "
                f"does not run it: {reason}"
            )

    def _config_json(self) -> dict[str, Any]:
        if isinstance(self.config, dict):
            return self.config
        try:
            config = json.loads(Path(self.config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.config={self.config!r}: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"model.config={self.config!r}: must hold a JSON object")
        return config


class GpuConfig(StrictModel):
    """GPUs of one type that may be rented."""

    device: str = Field(min_length=1, description="A device that comes with the package.")
    count: int = Field(ge=1, le=10_000, description="How many there are.")
    per_node: int = Field(default=8, ge=1, description="How many a node has.")
    price_per_hour: float | None = Field(
        default=None, gt=0, description="Of one of them, in any currency; null: count them instead."
    )
    link: str | None = Field(
        default=None, description="Between those of a node; null: replicas are of one GPU."
    )
    accelerator_type: str | None = Field(
        default=None, min_length=1, description="What Ray calls the type, for the file."
    )


class SearchConfig(StrictModel):
    """What to combine."""

    stages: Counts | None = Field(
        default=None, description="Depths of the pipeline; null: the powers of two."
    )
    tensor_parallel: Counts = Field(
        default=(1,), description="GPUs of a stage; the service runs 1, more are for comparison."
    )
    replicas: Counts | None = Field(
        default=None, description="Numbers of replicas; null: as many as there are GPUs for."
    )
    policies: Annotated[tuple[PolicyConfig, ...], Field(strict=False, min_length=1)] = Field(
        default=(BalancedConfig(),), description="Policies of the scheduler."
    )
    layers: Annotated[tuple[LayerPlan, ...], Field(strict=False, min_length=1)] = Field(
        default=("auto",),
        description="Splits of the layers: auto weighs embedding and head, even does not, a list "
        "is for pipelines of its length.",
    )
    num_finalists: int = Field(
        default=8,
        ge=1,
        description="All choices are screened by one replica with its share of the requests; so "
        "many of the best, and the frontier, are simulated with all of theirs.",
    )

    def depths(self, num_gpus: int) -> tuple[int, ...]:
        """Numbers of stages to try with `num_gpus`."""
        powers = (1 << exponent for exponent in range(num_gpus.bit_length()))
        return self.stages or tuple(powers)


class PlanSloConfig(StrictModel):
    """Limits that a percentile of the requests must keep; null: no limit."""

    percentile: Literal[50, 90, 99] = Field(
        default=99, description="Of each latency, also on the frontier."
    )
    ttft_s: float | None = Field(default=None, gt=0, description="Seconds to the first token.")
    tpot_s: float | None = Field(
        default=None, gt=0, description="Seconds per output token after the first."
    )
    e2e_s: float | None = Field(default=None, gt=0, description="Seconds to the last token.")


class PlanConfig(StrictModel):
    """All of a plan."""

    model: PlannedModelConfig
    gpus: Annotated[tuple[GpuConfig, ...], Field(strict=False, min_length=1)] = Field(
        description="Types to choose from; a deployment is of one type."
    )
    network: str | None = Field(
        default=None, description="Link between nodes; null: replicas stay on one."
    )
    host: str = Field(default="graphs", description="The process of each stage.")
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens of a KV block.")
    memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of a GPU for weights, activations and KV cache.",
    )
    max_decodes: int = Field(default=512, ge=1, description="Decodes in one micro-batch.")
    schedule_s: float = Field(
        default=0.001, ge=0, description="The scheduler's time for a micro-batch."
    )
    result_s: float = Field(
        default=0.001, ge=0, description="From the last stage to the scheduler."
    )
    routing: Literal["power_of_two", "prefix_aware"] = Field(
        default="power_of_two", description="Which replica a request goes to, as the service can."
    )
    workload: WorkloadConfig
    slo: PlanSloConfig = PlanSloConfig()
    frontier: Literal["ttft", "tpot", "e2e"] = Field(
        default="e2e", description="The latency that the frontier sets against the cost."
    )
    search: SearchConfig = SearchConfig()
    seed: int = Field(default=0, description="Of the workload and of routing.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [gpu.device for gpu in self.gpus]
        if len(set(names)) != len(names):
            raise ValueError(f"gpus={names}: must each be of another device")
        if len({gpu.price_per_hour is None for gpu in self.gpus}) == 2:
            raise ValueError("gpus[].price_per_hour=null: must be given for all of them or none")
        depths = {depth for gpu in self.gpus for depth in self.search.depths(gpu.count)}
        for plan in self.search.layers:
            if plan not in ("auto", "even") and len(plan) not in depths:
                raise ValueError(
                    f"search.layers={list(plan)}: is for {len(plan)} stages; must be for one of "
                    f"those that are searched, {sorted(depths)}"
                )
        return self

    @property
    def is_priced(self) -> bool:
        """Whether GPUs have a price."""
        return self.gpus[0].price_per_hour is not None

    def gpu(self, device: str) -> GpuConfig:
        """The GPUs of a type."""
        return next(gpu for gpu in self.gpus if gpu.device == device)


def parse_plan_config(data: object) -> PlanConfig:
    """Validate what a file holds.

    Raises:
        ConfigError: One line for each mistake, naming the key, the value and what is allowed.
    """
    return parse_strictly(PlanConfig, data)


def load_plan_config(path: Path) -> PlanConfig:
    """Read a file; the paths of a config.json and of a trace in it are relative to it.

    Raises:
        ConfigError: One line for each mistake, after the name of the file.
    """
    data = read_yaml(path)
    refuse_other_kind(path, data, "gpus")
    try:
        config = parse_plan_config(data)
    except ConfigError as error:
        raise error.prefixed(str(path)) from None
    model, workload = config.model, config.workload
    if isinstance(model.config, str):
        model = model.model_copy(update={"config": str(path.parent / model.config)})
    if isinstance(workload, TraceWorkloadConfig):
        workload = workload.model_copy(update={"path": str(path.parent / workload.path)})
    return config.model_copy(update={"model": model, "workload": workload})
