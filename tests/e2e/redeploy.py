"""Redeploys the demo model while clients stream from it; prints what came of every request.

A process of its own, because it needs a cluster of its own.
"""

import json
import logging
import sys
import threading
import time

import openai
from ray import serve

from gllm_ray.chat.stream import get_json
from gllm_ray.serving.app import build_app
from tests.local_ray import local_serve
from tests.process_titles import titles

NUM_STAGES = 1
NUM_CLIENTS = 4
NUM_TOKENS = 150
MODEL = "demo"


def deploy(max_model_len, **deployment):
    args = {
        "model": {
            "path": "package://gllm_ray/demo/model",
            "served_name": MODEL,
            "dtype": "float32",
            "max_model_len": max_model_len,
        },
        "pipeline": {"device": "cpu", "num_stages": NUM_STAGES, "cpus_per_stage": 0.5},
        "kv_cache": {"kv_cache_bytes": "16MiB"},
        "deployment": deployment,
    }
    serve.run(build_app(args), name="demo", route_prefix="/")


def wait_until_drained():
    """The stages of the old replica are gone."""
    deadline_s = time.monotonic() + 30
    while (num_stages := count_stages()) > NUM_STAGES:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{num_stages} stages are still there")
        time.sleep(0.2)


def count_stages():
    return sum(title.startswith("ray::StageActor") for title in titles().values())


class Clients:
    """Threads that stream one completion after the other."""

    def __init__(self, base_url, num_clients=NUM_CLIENTS):
        self._url = f"{base_url}/v1"
        self._is_over = threading.Event()
        self.outcomes = []
        self._threads = [
            threading.Thread(target=self._run, daemon=True) for _ in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for_outcomes(self):
        """Each client has begun another request, and ended it."""
        enough = len(self.outcomes) + 2 * len(self._threads)
        while len(self.outcomes) < enough:
            time.sleep(0.1)

    def end(self):
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self):
        with openai.OpenAI(base_url=self._url, api_key="x", max_retries=0) as client:
            while not self._is_over.is_set():
                start_s = time.monotonic()
                try:
                    text, error = self._stream(client), None
                except Exception as caught:  # noqa: BLE001
                    text, error = None, repr(caught)
                self.outcomes.append((start_s, time.monotonic(), text, error))

    def _stream(self, client):
        stream = client.completions.create(
            model=MODEL, prompt="def f(", max_tokens=NUM_TOKENS, temperature=0, stream=True
        )
        choices = [chunk.choices[0] for chunk in stream]
        assert choices[-1].finish_reason is not None, "the stream ended before the answer"
        return "".join(choice.text for choice in choices)


def main():
    deployment = json.loads(sys.argv[1])
    logging.disable(logging.INFO)
    with local_serve(num_cpus=8) as base_url:
        deploy(512, **deployment)
        clients = Clients(base_url)
        clients.wait_for_outcomes()
        begun_s = time.monotonic()
        deploy(256, **deployment)
        redeployed_s = time.monotonic()
        wait_until_drained()
        clients.wait_for_outcomes()
        clients.end()
        outcome = {
            "max_model_len": get_json(f"{base_url}/server_info")["max_model_len"],
            "begun_s": begun_s,
            "redeployed_s": redeployed_s,
            "requests": clients.outcomes,
        }
        print(json.dumps(outcome))  # noqa: T201


if __name__ == "__main__":
    main()
