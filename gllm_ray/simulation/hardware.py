"""The simulated pipeline of a configuration: stage times, links, and room for KV blocks."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo
from gllm_ray.partition import size_kv_cache
from gllm_ray.simulation.activations import activation_bytes
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.devices import Device, find_device
from gllm_ray.simulation.hardware_config import HardwareConfig, LinkConfig
from gllm_ray.simulation.hosts import Host, find_host
from gllm_ray.simulation.links import Link, find_link
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.simulation_config import SimulatedModelConfig, SimulationConfig
from gllm_ray.simulation.stage_profile import parse_prefill_times, parse_stage_profile
from gllm_ray.simulation.virtual_pipeline import mixed_links, uniform_links

_MAX_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A model on its devices.

    Attributes:
        cost: The time of each stage.
        links: Between each stage and the next; empty: transfers take no time.
        stages: What each device of each stage holds.
        num_blocks: KV blocks of every stage.
        max_model_len: Prompt and output tokens of a sequence.
    """

    cost: PipelineCost
    links: tuple[Link, ...]
    stages: tuple[StageInfo, ...]
    num_blocks: int
    max_model_len: int


def build_hardware(config: SimulationConfig) -> Hardware:
    """Lay the model out over the stages.

    Raises:
        ConfigError: A file cannot be read, or the model does not fit.
    """
    model = _read_model(config.model)
    max_model_len = config.model.max_model_len or _max_model_len(model)
    layout = _lay_out(model, config)
    stages = _stages(layout, config)
    return Hardware(
        cost=_cost(layout, config.hardware),
        links=_links(config.hardware, layout.num_stages),
        stages=stages,
        num_blocks=size_kv_cache(stages, config.kv_cache.block_size, max_model_len),
        max_model_len=max_model_len,
    )


def uncalibrated(config: HardwareConfig) -> list[str]:
    """The parts whose constants nobody has fitted to measurements."""
    links = [config.stage_link, config.nodes and config.nodes.link, config.tensor_parallel_link]
    parts: list[Device | Host | Link] = [
        find_link(link.name) for link in links if link and link.name
    ]
    if config.device is not None and not (config.profile or "").endswith(".json"):
        parts.append(find_device(config.device))
    if config.profile is None:
        parts.append(find_host(config.host))
    return words_for_uncalibrated(parts)


def words_for_uncalibrated(parts: Iterable[Device | Host | Link]) -> list[str]:
    """What kind of part each of them is and its name, each once, such as `host graphs`."""
    return list(
        dict.fromkeys(
            f"{type(part).__name__.lower()} {part.name}" for part in parts if not part.is_calibrated
        )
    )


def names_of_uncalibrated(parts: Iterable[Device | Host | Link]) -> list[str]:
    """The names of those whose constants nobody has fitted to measurements, each once."""
    return list(dict.fromkeys(part.name for part in parts if not part.is_calibrated))


def _read_model(config: SimulatedModelConfig) -> Mapping[str, Any]:
    if config.config is not None:
        return config.config
    assert config.path is not None
    path = Path(config.path)
    if path.is_dir():
        path /= "config.json"
    try:
        model = json.loads(_read(path, "model.path"))
    except ValueError as error:
        raise ConfigError(f"model.path={str(path)!r}: not JSON: {error}") from None
    if not isinstance(model, dict):
        raise ConfigError(f"model.path={str(path)!r}: must hold a JSON object")
    return model


def _max_model_len(model: Mapping[str, Any]) -> int:
    text = model.get("text_config")
    merged = {**model, **text} if isinstance(text, dict) else model
    for key in _MAX_LENGTHS:
        value = merged.get(key)
        if type(value) is int and value > 0:
            return value
    raise ConfigError(
        "model.max_model_len=null: must be given when the model's configuration has no "
        "max_position_embeddings, an integer >= 1"
    )


def _lay_out(model: Mapping[str, Any], config: SimulationConfig) -> PipelineLayout:
    pipeline = config.pipeline
    shape = parse_model_shape(model)
    if pipeline.layers == "auto":
        return PipelineLayout.split(shape, pipeline.num_stages, pipeline.tensor_parallel)
    return PipelineLayout.explicit(shape, pipeline.layers, pipeline.tensor_parallel)


def _stages(layout: PipelineLayout, config: SimulationConfig) -> tuple[StageInfo, ...]:
    """What the stages hold; the room is without limit where no device is known."""
    kv_cache, name = config.kv_cache, config.hardware.device
    stages = layout.stage_infos(
        device_name=name or "device",
        memory_bytes=find_device(name).memory_bytes if name else sys.maxsize,
        memory_utilization=kv_cache.memory_utilization,
        block_size=kv_cache.block_size,
        activation_bytes=activation_bytes(
            layout,
            config.scheduler.max_batch_tokens,
            has_graphs=config.hardware.host == "graphs",
        ),
    )
    if kv_cache.num_blocks is not None:
        stages = [replace(stage, max_kv_blocks=kv_cache.num_blocks) for stage in stages]
    elif (num_bytes := kv_cache.kv_cache_bytes) is not None:
        if name is not None:
            _check_kv_room(num_bytes, stages, find_device(name))
        stages = [
            replace(stage, max_kv_blocks=num_bytes // stage.kv_block_bytes) for stage in stages
        ]
    return tuple(stages)


def _check_kv_room(num_bytes: int, stages: Sequence[StageInfo], device: Device) -> None:
    for stage in stages:
        room_bytes = device.memory_bytes - stage.weight_bytes
        if num_bytes > room_bytes:
            raise ConfigError(
                f"kv_cache.kv_cache_bytes={num_bytes}: must be <= {room_bytes}, which "
                f"{stage.weight_bytes} bytes of weights of stage {stage.stage_id} leave of each "
                f"{device.name}"
            )


def _cost(layout: PipelineLayout, config: HardwareConfig) -> PipelineCost:
    device = find_device(config.device) if config.device is not None else None
    if config.profile is None:
        assert device is not None
        link = _link(config.tensor_parallel_link)
        return RooflineCost(layout, device, find_host(config.host), link)
    path = Path(config.profile)
    text = _read(path, "hardware.profile")
    try:
        if path.suffix == ".json":
            return MeasuredCost.from_profile(layout, parse_stage_profile(text))
        assert device is not None
        times_s = parse_prefill_times(text)
        return MeasuredCost.from_prefills(layout, times_s, device, layout.num_layers)
    except ConfigError as error:
        raise error.prefixed(f"hardware.profile={str(path)!r}") from None


def _links(config: HardwareConfig, num_stages: int) -> tuple[Link, ...]:
    link = _link(config.stage_link)
    if link is None or config.nodes is None:
        return uniform_links(link, num_stages)
    return mixed_links(link, config.nodes.link.link(), config.nodes.num_stages)


def _link(config: LinkConfig | None) -> Link | None:
    return None if config is None else config.link()


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={str(path)!r}: {error}") from None
