"""The one schema of configs/simulation/*.yaml, as strict as that of the service.

Keys that the service has too have its names and meaning: `scheduler` is the service's.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from gllm_ray.config import KvCacheConfig, SchedulerConfig, resolve_package_path
from gllm_ray.config.pipeline import LayerSplit
from gllm_ray.errors import ConfigError
from gllm_ray.predictor_config import ClassifierPredictorConfig, HintPredictorConfig
from gllm_ray.simulation.hardware_config import HardwareConfig
from gllm_ray.simulation.replica_config import (
    MAX_REPLICAS,
    SimulatedScalingConfig,
    StageLossConfig,
)
from gllm_ray.simulation.routing import RoutingName
from gllm_ray.simulation.workload_config import TraceWorkloadConfig, WorkloadConfig
from gllm_ray.strict_schema import StrictModel, parse_strictly
from gllm_ray.strict_yaml import read_yaml, refuse_other_kind

ModelT = TypeVar("ModelT", bound=StrictModel)


class SimulatedModelConfig(StrictModel):
    """Which model; only its shape counts."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="A Hugging Face config.json, or a directory with one.",
    )
    config: dict[str, Any] | None = Field(
        default=None, description="What a config.json holds, instead of `path`."
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Prompt and output tokens of a sequence; null: what the model was made for.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is None and self.config is None:
            raise ValueError("path=null: must be given when config is not")
        if self.path is not None and self.config is not None:
            raise ValueError(f"path={self.path!r}: must be left out when config is given")
        return self


class SimulatedPipelineConfig(StrictModel):
    """How the model is cut."""

    num_stages: int = Field(default=1, ge=1, le=256, description="Stages in the chain.")
    layers: LayerSplit = Field(
        default="auto", description="Decoder layers per stage; auto weighs embedding and head."
    )
    tensor_parallel: int = Field(default=1, ge=1, description="Devices that share each stage.")
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches in flight; null: as many as stages, and one "
        "more for balanced while prompts queue.",
    )
    crowding: float = Field(
        default=1.0,
        ge=1,
        description="How many times longer the scheduler takes a stage to compute while all others "
        "do, too: above 1 where stages share processors, which the stage times do not tell.",
    )
    ring: bool = Field(
        default=False,
        description="Whether a decode may be submitted before its token has come from the last "
        "stage: it goes on to the first one by itself. One more micro-batch is then in flight.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers != "auto" and len(self.layers) != self.num_stages:
            raise ValueError(
                f"layers={list(self.layers)}: must list num_stages={self.num_stages} stages, "
                f"not {len(self.layers)}"
            )
        return self


class SimulatedKvCacheConfig(KvCacheConfig):
    """The paged KV cache of every stage."""

    num_blocks: int | None = Field(
        default=None, ge=1, description="Blocks of every stage, instead of what its memory holds."
    )

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for key in ("memory_utilization", "kv_cache_bytes"):
            value = getattr(self, key)
            if self.num_blocks is not None and key in self.model_fields_set and value is not None:
                raise ValueError(f"{key}={value}: must be left out when num_blocks is given")
        return self


class SlowdownConfig(StrictModel):
    """A stage of every replica that computes slower for a while."""

    stage_id: int = Field(ge=0, description="The stage, from 0.")
    start_s: float = Field(ge=0, description="From when on.")
    end_s: float = Field(gt=0, description="Until when.")
    factor: float = Field(gt=0, description="On its times.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.end_s <= self.start_s:
            raise ValueError(f"end_s={self.end_s:g}: must be > start_s={self.start_s:g}")
        return self


class TimingConfig(StrictModel):
    """What takes time beside the stages' computing."""

    schedule_s: float = Field(
        default=0.0, ge=0, description="The scheduler's time for a micro-batch."
    )
    schedule_sequence_s: float = Field(
        default=0.0, ge=0, description="On top, for each of its sequences."
    )
    dispatch_s: float = Field(default=0.0, ge=0, description="From the scheduler to the stages.")
    result_s: float = Field(default=0.0, ge=0, description="From the last stage to the scheduler.")
    jitter: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Standard deviation of the logarithm of a stage's times.",
    )
    is_send_overlapped: bool = Field(
        default=True, description="Whether a stage computes while it sends."
    )
    slowdowns: Annotated[tuple[SlowdownConfig, ...], Field(strict=False)] = Field(
        default=(), description="Stages that compute slower for a while."
    )


class SloConfig(StrictModel):
    """What a good request is."""

    ttft_s: float | None = Field(default=None, gt=0, description="Most seconds to the first token.")
    tpot_s: float | None = Field(
        default=None, gt=0, description="Most seconds per output token after the first."
    )
    e2e_s: float | None = Field(default=None, gt=0, description="Most seconds to the last token.")


class SimulationConfig(StrictModel):
    """All of a simulation: what serves, and whom."""

    model: SimulatedModelConfig
    hardware: HardwareConfig
    pipeline: SimulatedPipelineConfig = SimulatedPipelineConfig()
    kv_cache: SimulatedKvCacheConfig = SimulatedKvCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    cost_model: Literal["fitted", "learnt"] = Field(
        default="fitted",
        description="What the scheduler knows of stage times without a cost_calibration: the "
        "fit to the simulated ones, or what it learns of them.",
    )
    timing: TimingConfig = TimingConfig()
    workload: WorkloadConfig
    slo: SloConfig | None = Field(default=None, description="What goodput counts; null: nothing.")
    num_replicas: int = Field(
        default=1, ge=1, le=MAX_REPLICAS, description="Replicas at the start."
    )
    routing: RoutingName = Field(
        default="power_of_two", description="Which replica a request goes to."
    )
    autoscaling: SimulatedScalingConfig | None = Field(
        default=None, description="null: the number of replicas stays."
    )
    losses: Annotated[tuple[StageLossConfig, ...], Field(strict=False)] = Field(
        default=(), description="Stages that die."
    )
    seed: int = Field(default=0, description="Of the workload, of routing and of jitter.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for mistake in (
            self._hardware_mistake(),
            self._scheduler_mistake(),
            self._index_mistake(),
        ):
            if mistake is not None:
                raise ValueError(mistake)
        return self

    def _hardware_mistake(self) -> str | None:
        hardware, pipeline, kv_cache = self.hardware, self.pipeline, self.kv_cache
        num_devices = pipeline.tensor_parallel
        has_link = hardware.tensor_parallel_link is not None
        if hardware.profile is not None and num_devices > 1:
            return (
                f"pipeline.tensor_parallel={num_devices}: must be 1 when hardware.profile is "
                "given, which tells the times of one device"
            )
        if hardware.profile is None and has_link != (num_devices > 1):
            must = "{...}: must be left out" if has_link else "null: must be given"
            return f"hardware.tensor_parallel_link={must} when tensor_parallel is {num_devices}"
        if hardware.stage_link is not None and pipeline.num_stages == 1:
            return "hardware.stage_link={...}: must be left out when num_stages is 1"
        nodes = hardware.nodes
        if nodes is not None and sum(nodes.num_stages) != pipeline.num_stages:
            return (
                f"hardware.nodes.num_stages={list(nodes.num_stages)}: must add up to "
                f"pipeline.num_stages={pipeline.num_stages}"
            )
        has_room = kv_cache.num_blocks is not None or kv_cache.kv_cache_bytes is not None
        if hardware.device is None and not has_room:
            return "kv_cache.num_blocks=null: must be given, or kv_cache_bytes, without a device"
        return None

    def _scheduler_mistake(self) -> str | None:
        scheduler = self.scheduler
        if scheduler.length_log is not None:
            return f"scheduler.length_log={scheduler.length_log!r}: must be null in a simulation"
        predictor, workload = scheduler.length_predictor, self.workload
        if isinstance(predictor, ClassifierPredictorConfig):
            return (
                "scheduler.length_predictor.name='classifier': must be statistics or hint in a "
                "simulation, whose prompts have no words to tell lengths from"
            )
        is_recorded = isinstance(workload, TraceWorkloadConfig) and workload.path.endswith(".jsonl")
        has_hints = workload.hint_sigma is not None or is_recorded
        if isinstance(predictor, HintPredictorConfig) and not has_hints:
            return (
                "workload.hint_sigma=null: must be given when scheduler.length_predictor is hint; "
                "0: clients know how long their outputs will be"
            )
        if scheduler.cost_calibration is not None and "cost_model" in self.model_fields_set:
            return (
                f"cost_model={self.cost_model!r}: must be left out when "
                "scheduler.cost_calibration is given"
            )
        return None

    def _index_mistake(self) -> str | None:
        for index, slowdown in enumerate(self.timing.slowdowns):
            if slowdown.stage_id >= self.pipeline.num_stages:
                return (
                    f"timing.slowdowns[{index}].stage_id={slowdown.stage_id}: must be < "
                    f"pipeline.num_stages={self.pipeline.num_stages}"
                )
        for index, loss in enumerate(self.losses):
            if loss.replica_id >= self.num_replicas:
                return (
                    f"losses[{index}].replica_id={loss.replica_id}: must be < "
                    f"num_replicas={self.num_replicas}"
                )
        scaling = self.autoscaling
        if scaling and not scaling.min_replicas <= self.num_replicas <= scaling.max_replicas:
            return (
                f"num_replicas={self.num_replicas}: must be from autoscaling.min_replicas="
                f"{scaling.min_replicas} to max_replicas={scaling.max_replicas}"
            )
        return None


def parse_simulation_config(data: object) -> SimulationConfig:
    """Validate what a configuration file holds.

    Raises:
        ConfigError: One line for each mistake, naming the key, the value and what is allowed.
    """
    return parse_strictly(SimulationConfig, data)


def load_simulation_config(path: Path) -> SimulationConfig:
    """Read a configuration file; the paths in it are relative to it.

    Raises:
        ConfigError: One line for each mistake, after the name of the file.
    """
    data = read_yaml(path)
    refuse_other_kind(path, data, "hardware")
    try:
        return _anchored(parse_simulation_config(data), path.parent)
    except ConfigError as error:
        raise error.prefixed(str(path)) from None


def _anchored(config: SimulationConfig, directory: Path) -> SimulationConfig:
    """The same with all paths relative to a directory."""

    def anchor(part: ModelT, key: str) -> ModelT:
        path = getattr(part, key)
        if path is None:
            return part
        return part.model_copy(update={key: str(directory / resolve_package_path(path))})

    scheduler, workload = anchor(config.scheduler, "cost_calibration"), config.workload
    if isinstance(workload, TraceWorkloadConfig):
        workload = anchor(workload, "path")
    return config.model_copy(
        update={
            "model": anchor(config.model, "path"),
            "hardware": anchor(config.hardware, "profile"),
            "scheduler": scheduler,
            "workload": workload,
        }
    )
