"""Sends prompts that begin alike to two replicas; prints what was found in their prefix caches.

A process of its own, because it needs a cluster of its own.
"""

import json
import logging
import sys

import httpx
import ray
from ray import serve

from gllm_ray.demo.serve_process import free_port
from gllm_ray.messages import GenerationRequest
from gllm_ray.serving.app import build_app

MODEL = "demo"
NUM_PREFIXES = 4
NUM_REQUESTS = 6  # of each prefix
PREFIX_TOKENS = 128


def deploy(routing):
    args = {
        "model": {
            "path": "package://gllm_ray/demo/model",
            "served_name": MODEL,
            "dtype": "float32",
            "max_model_len": 256,
        },
        "pipeline": {"device": "cpu", "num_stages": 1, "cpus_per_stage": 0.3},
        "kv_cache": {"kv_cache_bytes": "16MiB"},
        "deployment": {"min_replicas": 2, "max_replicas": 2, "routing": routing},
    }
    return serve.run(build_app(args), name="demo", route_prefix="/")


def call(handle):
    """By handle calls, which show the router the prompt."""
    for number in range(NUM_REQUESTS):
        for prefix in range(NUM_PREFIXES):
            request = GenerationRequest(
                request_id=f"{prefix}-{number}",
                prompt_token_ids=(*[100 + prefix] * PREFIX_TOKENS, number),
                max_tokens=4,
            )
            events = [e for step in handle.generate.remote(request) for e in step]
            assert events[-1].finish_reason is not None


def post(base_url):
    """By HTTP, where the router sees the session alone."""
    for number in range(NUM_REQUESTS):
        for prefix in range(NUM_PREFIXES):
            prompt = [200 + prefix] * PREFIX_TOKENS + [number]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 4}
            answer = httpx.post(
                f"{base_url}/v1/completions",
                json=body,
                headers={"x-session-id": f"session {prefix}"},
                timeout=60,
            )
            assert answer.status_code == 200, answer.text


def count_hits(handle):
    """Tokens found in the prefix caches of both replicas, each asked until it has answered."""
    loads = {}
    for _ in range(60):
        load = handle.server_info.remote().result()["load"]
        loads[json.dumps(load)] = load
    return [load["num_prefix_hit_tokens"] for load in loads.values()]


def main():
    logging.disable(logging.INFO)
    port = free_port()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        handle = deploy(sys.argv[1])
        call(handle.options(stream=True))
        called = count_hits(handle)
        post(f"http://127.0.0.1:{port}")
        print(json.dumps({"called": called, "posted": count_hits(handle)}))  # noqa: T201
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
