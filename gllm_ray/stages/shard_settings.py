"""What a stage loads, and how it computes: layers, type, device."""

import os

import torch
from transformers import PreTrainedConfig

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.model.shard import count_parameters
from gllm_ray.partition import explicit_layers, split_layers


def choose_layers(
    config: ServiceConfig, model_config: PreTrainedConfig, stage_id: int
) -> tuple[int, int]:
    """The half-open range of layers that a stage holds.

    Raises:
        ConfigError: The model cannot be split so.
    """
    pipeline = config.pipeline
    if pipeline.layers == "auto":
        counts = count_parameters(model_config)
        ranges = split_layers(counts.layers, counts.head, pipeline.num_stages)
    else:
        ranges = explicit_layers(pipeline.layers, model_config.num_hidden_layers)
    return ranges[stage_id]


def choose_dtype(
    config: ServiceConfig, model_config: PreTrainedConfig, device: torch.device
) -> torch.dtype:
    """The type of weights, KV cache and activations."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    stored = model_config.dtype
    if device.type == "cpu":
        # float16 has no operators there; every float16 is a float32.
        return torch.float32 if stored in (None, torch.float16) else stored
    return torch.bfloat16 if stored is None else stored


def prepare_device(config: ServiceConfig) -> torch.device:
    """The device of a stage, ready for use by this process.

    Raises:
        ConfigError: There is no GPU.
    """
    if config.pipeline.device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("pipeline.device='cuda': torch finds no GPU here; use cpu")
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    share = max(1, num_cores() // config.pipeline.num_stages)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    return torch.device("cpu")


def num_cores() -> int:
    """CPU cores that this process may use; all of the machine where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
