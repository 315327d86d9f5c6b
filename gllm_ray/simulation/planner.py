"""Which deployments there are, and why some cannot be."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo
from gllm_ray.policy_config import PolicyConfig
from gllm_ray.simulation.activations import activation_bytes
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.links import find_link
from gllm_ray.simulation.model_shape import ModelShape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.plan_config import GpuConfig, LayerPlan, PlanConfig

_MAX_CHOICES = 10_000  # hours of screening


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A model cut for one type of GPU.

    Attributes:
        device: The GPU.
        tensor_parallel: GPUs of a stage.
        layers: Layers of each stage.
    """

    device: str
    tensor_parallel: int
    layers: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Depth of the pipeline."""
        return len(self.layers)

    @property
    def num_gpus(self) -> int:
        """GPUs of a replica."""
        return self.num_stages * self.tensor_parallel

    def layout(self, model: ModelShape) -> PipelineLayout:
        """The stages."""
        return PipelineLayout.explicit(model, self.layers, self.tensor_parallel)

    def __str__(self) -> str:
        return f"{self.device}, {_stages(self.num_stages, self.tensor_parallel)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A deployment that may be simulated.

    Attributes:
        cut: The model on one replica.
        num_replicas: How many replicas.
        policy: Of their schedulers.
    """

    cut: Cut
    num_replicas: int
    policy: PolicyConfig

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.cut.num_gpus * self.num_replicas


@dataclass(frozen=True, slots=True)
class Rejection:
    """What was not simulated.

    Attributes:
        what: GPU, stages and tensor parallelism, and the replicas if these are the reason.
        reason: What is missing.
    """

    what: str
    reason: str


def enumerate_choices(config: PlanConfig) -> tuple[list[Choice], list[Rejection]]:
    """Every combination of what is searched, apart from those that cannot be.

    Raises:
        ConfigError: The model, a device or a link is not known, the model is not served, or there
            are too many.
    """
    model, search = config.model.shape(), config.search
    config.model.check_served()
    for link in (config.network, *(gpu.link for gpu in config.gpus)):
        if link is not None:
            find_link(link)
    choices: list[Choice] = []
    rejections: list[Rejection] = []
    for gpu in config.gpus:
        degrees = product(search.depths(gpu.count), search.tensor_parallel)
        for num_stages, tensor_parallel in degrees:
            what = f"{gpu.device}, {_stages(num_stages, tensor_parallel)}"
            try:
                cuts = list(_cuts(config, model, gpu, num_stages, tensor_parallel))
                max_replicas = _max_replicas(config, gpu, num_stages, tensor_parallel)
            except ConfigError as error:
                rejections.append(Rejection(what, str(error)))
                continue
            fitting = [cut for cut in cuts if _fits(config, model, cut, rejections)]
            for num_replicas in search.replicas or range(1, max_replicas + 1):
                if num_replicas > max_replicas:
                    reason = f"{gpu.count} GPUs, {gpu.per_node} a node, hold {max_replicas}"
                    rejections.append(Rejection(f"{what}, {num_replicas} replicas", reason))
                    continue
                choices += [
                    Choice(cut=cut, num_replicas=num_replicas, policy=policy)
                    for cut, policy in product(fitting, search.policies)
                ]
    choices = list(dict.fromkeys(choices))
    if len(choices) > _MAX_CHOICES:
        raise ConfigError(
            f"{len(choices)} choices are possible; must be at most {_MAX_CHOICES} to be screened: "
            "name search.stages and search.replicas, or fewer GPUs"
        )
    return choices, list(dict.fromkeys(rejections))


def stage_infos(config: PlanConfig, model: ModelShape, cut: Cut) -> list[StageInfo]:
    """What the stages of a replica hold, as the engine tells when it starts.

    Raises:
        ConfigError: The weights of a stage do not fit.
    """
    return cut.layout(model).stage_infos(
        device_name=cut.device,
        memory_bytes=find_device(cut.device).memory_bytes,
        memory_utilization=config.memory_utilization,
        block_size=config.block_size,
        activation_bytes=stage_activations(config, model, cut),
    )


def stage_activations(config: PlanConfig, model: ModelShape, cut: Cut) -> tuple[int, ...]:
    """About the bytes that the largest micro-batch of any policy needs on each stage."""
    num_rows = max(policy.max_batch_tokens(config.max_decodes) for policy in config.search.policies)
    return activation_bytes(cut.layout(model), num_rows, has_graphs=config.host == "graphs")


def stages_per_node(gpu: GpuConfig, num_stages: int, tensor_parallel: int) -> tuple[int, ...]:
    """Stages of a replica on each of its nodes: as many on each as it has room for."""
    room = gpu.per_node // tensor_parallel
    full, rest = divmod(num_stages, room)
    return (room,) * full + ((rest,) if rest else ())


def is_servable(choice: Choice) -> bool:
    """Whether the service can run it: its stages are of one GPU."""
    return choice.cut.tensor_parallel == 1


def _cuts(
    config: PlanConfig, model: ModelShape, gpu: GpuConfig, num_stages: int, tensor_parallel: int
) -> Iterator[Cut]:
    """The splits of the layers, each once.

    Raises:
        ConfigError: The model cannot be cut so.
    """
    splits: dict[tuple[int, ...], None] = {}
    for plan in config.search.layers:
        if plan in ("auto", "even") or len(plan) == num_stages:
            splits[_split(model, plan, num_stages, tensor_parallel)] = None
    for layers in splits:
        yield Cut(device=gpu.device, tensor_parallel=tensor_parallel, layers=layers)


def _split(
    model: ModelShape, plan: LayerPlan, num_stages: int, tensor_parallel: int
) -> tuple[int, ...]:
    if plan == "auto":
        layout = PipelineLayout.split(model, num_stages, tensor_parallel)
    elif plan == "even":
        if num_stages > model.num_layers:
            raise ConfigError(f"{num_stages} stages: the model has {model.num_layers} layers")
        each, rest = divmod(model.num_layers, num_stages)
        num_layers = [each + (stage < rest) for stage in range(num_stages)]
        layout = PipelineLayout.explicit(model, num_layers, tensor_parallel)
    else:
        layout = PipelineLayout.explicit(model, plan, tensor_parallel)
    return tuple(layout.num_layers)


def _max_replicas(config: PlanConfig, gpu: GpuConfig, num_stages: int, tensor_parallel: int) -> int:
    """Replicas that the GPUs hold: several share a node, or one has nodes of its own.

    Raises:
        ConfigError: None, or a link is missing.
    """
    num_gpus = num_stages * tensor_parallel
    if num_gpus > gpu.count:
        raise ConfigError(f"needs {num_gpus} GPUs, of which there are {gpu.count}")
    if tensor_parallel > gpu.per_node:
        raise ConfigError(
            f"a stage of {tensor_parallel} GPUs would span nodes of {gpu.per_node}; tensor "
            "parallelism stays within one"
        )
    if num_gpus > 1 and gpu.link is None:
        raise ConfigError(f"needs {num_gpus} GPUs together, but gpus.link is null")
    per_node = stages_per_node(gpu, num_stages, tensor_parallel)
    if len(per_node) > 1 and config.network is None:
        raise ConfigError(f"needs {len(per_node)} nodes of {gpu.per_node} GPUs; network is null")
    full, rest = divmod(gpu.count, gpu.per_node)
    if len(per_node) == 1:
        return full * (gpu.per_node // num_gpus) + rest // num_gpus
    num_replicas, spare = divmod(full, len(per_node))
    # The last node of a replica may be the one that is not full.
    num_replicas += spare == len(per_node) - 1 and rest >= per_node[-1] * tensor_parallel
    if not num_replicas:
        raise ConfigError(f"needs {num_gpus} GPUs on {len(per_node)} nodes; too few are full")
    return num_replicas


def _fits(config: PlanConfig, model: ModelShape, cut: Cut, rejections: list[Rejection]) -> bool:
    """Whether every stage can compute and hold one sequence; if not, the rejection says why."""
    layout, activations = cut.layout(model), stage_activations(config, model, cut)
    memory_bytes = find_device(cut.device).memory_bytes
    usable_bytes = int(config.memory_utilization * memory_bytes)
    num_blocks = -(-config.model.max_model_len // config.block_size)
    for stage_id in range(cut.num_stages):
        weight_bytes = layout.num_parameters(stage_id) * model.value_bytes
        kv_bytes = num_blocks * config.block_size * layout.kv_bytes_per_token(stage_id)
        needed_bytes = weight_bytes + activations[stage_id] + kv_bytes
        if needed_bytes > usable_bytes:
            reason = (
                f"stage {stage_id} needs {_gib(needed_bytes)} on each {cut.device}: "
                f"{_gib(weight_bytes)} of weights, about {_gib(activations[stage_id])} of "
                f"activations, and {_gib(kv_bytes)} of KV cache for one sequence of "
                f"{config.model.max_model_len} tokens; available are "
                f"{_gib(usable_bytes)}, {config.memory_utilization:g} of {_gib(memory_bytes)}"
            )
            rejections.append(Rejection(f"{cut}, layers {list(cut.layers)}", reason))
            return False
    return True


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _stages(num_stages: int, tensor_parallel: int) -> str:
    noun = "stage" if num_stages == 1 else "stages"
    return f"{num_stages} {noun} x {tensor_parallel} GPU"
