"""A small plan: a model of some 350 M parameters on GPUs of 24 GB, two seconds of traffic."""

from gllm_ray.simulation.plan_config import parse_plan_config
from tests.unit.simulation.configs import LLAMA_3_8B

TINY = LLAMA_3_8B | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}


def plan(**changes):
    """A plan whose every section may be replaced."""
    values = {
        "model": {"path": "some/model", "config": TINY, "max_model_len": 4096},
        "gpus": [{"device": "L4", "count": 4, "price_per_hour": 0.5, "link": "pcie-4-x16"}],
        "workload": {
            "arrivals": 20,
            "lengths": {
                "prompt": 200,
                "output": {"name": "uniform", "min_tokens": 10, "max_tokens": 40},
            },
            "num_requests": 24,
        },
        "slo": {"ttft_s": 1, "tpot_s": 0.1},
        "search": {"stages": [1, 2], "replicas": [1, 2], "policies": ["balanced", "temporal"]},
    }
    return parse_plan_config(values | changes)
