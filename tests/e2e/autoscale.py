"""Lets a service start from no replica, grow under load and shrink to none; prints what happened.

A process of its own, because it needs a cluster of its own.
"""

import json
import logging
import threading
import time

import ray
from ray import serve

from gllm_ray.demo.serve_process import free_port
from gllm_ray.serving.app import build_app
from tests.e2e.redeploy import MODEL, Clients
from tests.e2e.two_replicas import count_placement_groups

LIMIT_S = 60


def deploy():
    args = {
        "model": {
            "path": "package://gllm_ray/demo/model",
            "served_name": MODEL,
            "dtype": "float32",
            "max_model_len": 256,
        },
        "pipeline": {"device": "cpu", "num_stages": 1, "cpus_per_stage": 0.3},
        "kv_cache": {"kv_cache_bytes": "2MiB"},
        "deployment": {
            "min_replicas": 0,
            "max_replicas": 2,
            # Only what the engine tells can ask for the second replica.
            "target_ongoing_requests": 1000,
            "autoscaling": {
                "target_kv_utilization": 0.1,
                "interval_s": 0.5,
                "upscale_delay_s": 0.5,
                "downscale_delay_s": 1.0,
            },
        },
    }
    serve.run(build_app(args), name="demo", route_prefix="/")


class Watch:
    """A thread that notes how many replicas run, whenever that changes.

    Attributes:
        changes: When, and to what number.
    """

    def __init__(self):
        self.changes = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_for(self, num_replicas):
        deadline_s = time.monotonic() + LIMIT_S
        while self.changes[-1:] == [] or self.changes[-1][1] != num_replicas:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"there are never {num_replicas} replicas: {self.changes}")
            time.sleep(0.05)

    def end(self):
        self._is_over.set()
        self._thread.join()

    def _run(self):
        while not self._is_over.wait(0.1):
            deployment = serve.status().applications["demo"].deployments["LLMServer"]
            num_running = deployment.replica_states.get("RUNNING", 0)
            if not self.changes or self.changes[-1][1] != num_running:
                self.changes.append((time.monotonic(), num_running))


def wait_until_freed():
    """The replicas that have gone have left no placement group."""
    deadline_s = time.monotonic() + LIMIT_S
    while count_placement_groups():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{count_placement_groups()} placement groups are left")
        time.sleep(0.1)


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
        deploy()
        watch = Watch()
        try:
            watch.wait_for(0)
            clients = Clients(f"http://127.0.0.1:{port}", num_clients=2)
            watch.wait_for(2)
            clients.wait_for_outcomes()
            clients.end()
            watch.wait_for(0)
        finally:
            watch.end()
        wait_until_freed()
        print(json.dumps({"changes": watch.changes, "requests": clients.outcomes}))  # noqa: T201
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
