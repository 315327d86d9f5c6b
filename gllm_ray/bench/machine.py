"""What a measurement was made on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import gllm_ray
from gllm_ray.bench.source_commit import source_commit
from gllm_ray.stages.shard_settings import num_cores


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and how busy the machine is now, in JSON's types.

    Args:
        device: What stages run on, `cpu` or `cuda`.
    """
    return {
        "hardware": torch.cuda.get_device_name(0) if device == "cuda" else _cpu_name(),
        "num_cores": num_cores(),
        "versions": {
            "gllm_ray": gllm_ray.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ray": metadata.version("ray"),
        },
        "commit": source_commit(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_name() -> str:
    """The model of the processor; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
