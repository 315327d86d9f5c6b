"""Lets a service grow under load and shrink, in one of two scenarios; prints what happened.

A process of its own, because it needs a cluster of its own.
"""

import json
import logging
import sys
import threading
import time

from ray import serve

from gllm_ray.chat.stream import get_json
from gllm_ray.serving.app import build_app
from tests.e2e.redeploy import MODEL, Clients, count_stages
from tests.e2e.two_replicas import count_placement_groups
from tests.local_ray import local_serve

LIMIT_S = 80


def deploy(max_model_len=256, **deployment):
    args = {
        "model": {
            "path": "package://gllm_ray/demo/model",
            "served_name": MODEL,
            "dtype": "float32",
            "max_model_len": max_model_len,
        },
        "pipeline": {"device": "cpu", "num_stages": 1, "cpus_per_stage": 0.3},
        "kv_cache": {"kv_cache_bytes": "2MiB"},
        "deployment": deployment,
    }
    serve.run(build_app(args), name="demo", route_prefix="/")


class Watch:
    """A thread that notes how many replicas of a deployed service run, whenever that changes.

    Attributes:
        changes: When, and to what number.
    """

    def __init__(self):
        self.changes = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()

    def wait_for(self, num_replicas):
        deadline_s = time.monotonic() + LIMIT_S
        while self.changes[-1:] == [] or self.changes[-1][1] != num_replicas:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"there are never {num_replicas} replicas: {self.changes}")
            time.sleep(0.05)

    def _run(self):
        while not self._is_over.wait(0.1):
            deployment = serve.status().applications["demo"].deployments["LLMServer"]
            num_running = deployment.replica_states.get("RUNNING", 0)
            if not self.changes or self.changes[-1][1] != num_running:
                self.changes.append((time.monotonic(), num_running))


def wait_until_freed(num_replicas):
    """The replicas that have gone have left no placement group and no stage."""
    deadline_s = time.monotonic() + LIMIT_S
    while (left := (count_placement_groups(), count_stages())) != (num_replicas, num_replicas):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{left} placement groups and stages are left")
        time.sleep(0.1)


DELAYS = {"interval_s": 0.5, "upscale_delay_s": 0.5, "downscale_delay_s": 1.0}


def from_zero(base_url):
    """From no replica to two and back, as the engines ask."""
    deploy(
        min_replicas=0,
        max_replicas=2,
        # Only what the engine tells can ask for the second replica.
        target_ongoing_requests=1000,
        autoscaling=DELAYS | {"target_kv_utilization": 0.1},
    )
    with Watch() as watch:
        watch.wait_for(0)
        clients = Clients(base_url, num_clients=2)
        watch.wait_for(2)
        clients.wait_for_outcomes()
        clients.end()
        watch.wait_for(0)
    return {"requests": clients.outcomes, "changes": watch.changes}


def with_redeploy(base_url):
    """From one replica to three and back, and then to one of another version."""
    options = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 1.5,
        "autoscaling": DELAYS,
        "max_surge_percent": 100,
    }
    deploy(256, **options)
    with Watch() as watch:
        watch.wait_for(1)
        steady, rush = Clients(base_url, num_clients=1), Clients(base_url, num_clients=4)
        watch.wait_for(3)
        rush.wait_for_outcomes()
        rush.end()
        watch.wait_for(1)
        num_before = len(watch.changes)
        deploy(512, **options)
        watch.wait_for(1)
        steady.wait_for_outcomes()
        steady.end()
    return {
        "requests": steady.outcomes + rush.outcomes,
        "changes": watch.changes,
        "num_before": num_before,
        "max_model_len": get_json(f"{base_url}/server_info")["max_model_len"],
    }


SCENARIOS = {"from_zero": from_zero, "with_redeploy": with_redeploy}


def main():
    logging.disable(logging.INFO)
    with local_serve(num_cpus=8) as base_url:
        outcome = SCENARIOS[sys.argv[1]](base_url)
        wait_until_freed(num_replicas=outcome["changes"][-1][1])
        print(json.dumps(outcome))  # noqa: T201


if __name__ == "__main__":
    main()
