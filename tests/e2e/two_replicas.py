"""Two replicas that fill their cluster: prints what was found in their prefix caches, and what the
death of one leaves.

A process of its own, because it needs a cluster of its own.
"""

import json
import logging
import os
import signal
import sys
import time

import httpx
from ray import serve
from ray.util.placement_group import placement_group_table

from gllm_ray.messages import GenerationRequest
from gllm_ray.serving.app import build_app
from tests.local_ray import local_serve
from tests.process_titles import titles

MODEL = "demo"
# Odd numbers, so that no two replicas have counted the same.
NUM_PREFIXES = 3
NUM_CALLS, NUM_POSTS = 6, 5  # of each prefix
PREFIX_TOKENS = 128
LIMIT_S = 60


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
    for number in range(NUM_CALLS):
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
    for number in range(NUM_POSTS):
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


def replicas():
    return {pid for pid, title in titles().items() if title.startswith("ray::ServeReplica")}


def lose_a_replica():
    """Kill one of them, and tell how long it takes until there are two again."""
    before, start_s = replicas(), time.monotonic()
    os.kill(min(before), signal.SIGKILL)
    while True:
        states = serve.status().applications["demo"].deployments["LLMServer"].replica_states
        if states == {"RUNNING": 2} and len(replicas() - before) == 1:
            return time.monotonic() - start_s
        if time.monotonic() - start_s > LIMIT_S:
            raise TimeoutError(f"no replica came in place of the lost one: {states}")
        time.sleep(0.2)


def count_placement_groups():
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def main():
    logging.disable(logging.INFO)
    # All CPUs are reserved by the two replicas.
    with local_serve(num_cpus=1) as base_url:
        handle = deploy(sys.argv[1])
        call(handle.options(stream=True))
        called = count_hits(handle)
        post(base_url)
        posted = count_hits(handle)
        restart_s = lose_a_replica()
        outcome = {
            "called": called,
            "posted": posted,
            "restart_s": restart_s,
            "num_placement_groups": count_placement_groups(),
        }
        print(json.dumps(outcome))  # noqa: T201


if __name__ == "__main__":
    main()
