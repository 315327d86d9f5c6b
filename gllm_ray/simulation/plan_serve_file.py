"""The file of Ray Serve that runs a choice of a plan."""

from typing import Any

import yaml

from gllm_ray.serve_file import IMPORT_PATH
from gllm_ray.simulation.plan_config import PlanConfig
from gllm_ray.simulation.planner import Choice, is_servable, stages_per_node


def serve_yaml(config: PlanConfig, choice: Choice) -> str:
    """The file that `gllm-ray serve` takes to run a choice.

    Raises:
        ValueError: The service cannot run it.
    """
    if not is_servable(choice):
        raise ValueError(f"{choice.cut}: must be 1 GPU a stage, more are not served")
    model, gpu = config.model, config.gpu(choice.cut.device)
    per_node = stages_per_node(gpu, choice.cut.num_stages, 1)
    pipeline: dict[str, Any] = {
        "num_stages": choice.cut.num_stages,
        "layers": list(choice.cut.layers),
        "placement_strategy": "STRICT_PACK" if len(per_node) == 1 else "PACK",
    }
    if gpu.accelerator_type is not None:
        pipeline["accelerator_type"] = gpu.accelerator_type
    loaded: dict[str, Any] = {
        "path": model.path,
        "dtype": model.shape().dtype,
        "max_model_len": model.max_model_len,
    }
    if config.host != "graphs":
        loaded["enforce_eager"] = True
    replicas = choice.num_replicas
    args = {
        "model": loaded,
        "pipeline": pipeline,
        "kv_cache": {
            "block_size": config.block_size,
            "memory_utilization": config.memory_utilization,
        },
        "scheduler": {
            "policy": choice.policy.model_dump(mode="json"),
            "max_decodes": config.max_decodes,
        },
        "deployment": {
            "min_replicas": replicas,
            "max_replicas": replicas,
            "routing": config.routing,
        },
    }
    application = {
        "name": "planned",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
    }
    return yaml.safe_dump({"applications": [application]}, sort_keys=False)
