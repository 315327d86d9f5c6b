"""Two models behind a front end, and harm to its parts; prints what their clients got.

A process of its own, because it needs a cluster of its own.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import yaml
from ray import serve

from gllm_ray.config import FRONT_END_NAME
from gllm_ray.serving.app import build_app
from tests.local_ray import local_serve
from tests.process_titles import titles

CONFIG = Path(__file__).parents[2] / "configs" / "two_models.yaml"
NAME, MODEL, OTHER = "two-models", "demo", "demo-bfloat16"
NUM_TOKENS = 200
KILL_AFTER = 25  # pieces of the first answer
LIMIT_S = 60

COMPLETION = {"model": MODEL, "prompt": "def f(", "max_tokens": NUM_TOKENS, "temperature": 0}
# Takes the model half a minute and more, unless it is aborted.
LONG = COMPLETION | {"max_tokens": 500, "n": 128, "ignore_eos": True}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
# Among all tokens, some are as likely as others but for the rounding, which the batch decides on.
SAMPLED = {"temperature": 1.0, "seed": 17, "top_k": 8}
PENALIZED = {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "min_tokens": NUM_TOKENS // 2}
PENALIZED |= {"bad_words": ["def", "if not"]}
NOT_OPENAIS = {"top_k", "repetition_penalty", "min_tokens", "bad_words"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count the lines of a file."}]}
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 20, "maxItems": 20}
STRUCTURED = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
    "logprobs": True,
    "top_logprobs": 2,
}
REQUESTS = [
    ("completions", COMPLETION | STREAM),
    ("completions", COMPLETION | STREAM | SAMPLED),
    ("completions", COMPLETION | STREAM | {"stop": ["return"]}),
    ("completions", COMPLETION | STREAM | PENALIZED | {"stop": ["return"]}),
    ("completions", COMPLETION | SAMPLED | {"n": 2}),
    ("chat", CHAT | STREAM | {"max_tokens": NUM_TOKENS, "temperature": 0}),
    ("chat", CHAT | STREAM | STRUCTURED | {"max_tokens": NUM_TOKENS, "temperature": 0}),
]


def deploy(**deployment):
    args = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]["args"]
    for model in args["models"]:
        model["deployment"] = deployment
    serve.run(build_app(args), name=NAME, route_prefix="/")


def pids(deployment):
    """The replicas of a deployment."""
    replica = re.compile(rf"ray::ServeReplica:{NAME}:{re.escape(deployment)}(\.\w+)?$")
    return [pid for pid, title in titles().items() if replica.match(title)]


def kill(deployment):
    """One replica, or the only one."""
    os.kill(min(pids(deployment)), signal.SIGKILL)


def load(model=MODEL):
    return serve.get_deployment_handle(model, NAME).server_info.remote().result()["load"]


def until_idle():
    """The seconds until a model has no request, and the load it has then."""
    start_s = time.monotonic()
    while (now := load())["num_requests"]:
        if time.monotonic() - start_s > LIMIT_S:
            raise TimeoutError(f"requests are still open: {now}")
        time.sleep(0.05)
    return time.monotonic() - start_s, now


class Api:
    def __init__(self, base_url):
        self.base_url = base_url
        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="x", max_retries=0)
        self._routes = {
            "completions": self._client.completions,
            "chat": self._client.chat.completions,
        }

    def ask(self, request, on_piece=lambda number: None):
        """Texts, finish reasons, usage, and the longest pause between two pieces.

        Beside the usage, the number of tokens that log probabilities tell of; without the cached
        tokens, which tell of the past.
        """
        route, body = request
        ours = {key: body[key] for key in body.keys() & NOT_OPENAIS}
        openais = {key: body[key] for key in body.keys() - ours.keys()}
        answer = self._routes[route].create(**openais, extra_body=ours)
        texts, reasons, usage, num_scored = defaultdict(str), {}, None, 0
        longest_s, latest_s = 0.0, time.monotonic()
        pieces = answer if body.get("stream") else [answer]
        for number, piece in enumerate(pieces, start=1):
            longest_s = max(longest_s, time.monotonic() - latest_s)
            latest_s = time.monotonic()
            usage = piece.usage or usage
            for choice in piece.choices:
                texts[choice.index] += text_of(choice)
                num_scored += len(choice.logprobs.content) if choice.logprobs else 0
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            on_piece(number)
        costs = usage.model_dump() | {"num_scored": num_scored}
        cached = costs.pop("prompt_tokens_details")["cached_tokens"]
        if not 0 <= cached < usage.prompt_tokens:
            raise ValueError(f"cached tokens that there cannot be: {usage}")
        end = [sorted(texts.items()), sorted(reasons.items()), costs]
        return end, longest_s

    def ask_all(self, on_piece=lambda number: None):
        """All requests at once; `on_piece` is told of the first one's."""
        with ThreadPoolExecutor(len(REQUESTS)) as threads:
            first = threads.submit(self.ask, REQUESTS[0], on_piece)
            others = [threads.submit(self.ask, request) for request in REQUESTS[1:]]
            answers = [each.result() for each in (first, *others)]
        return [end for end, _ in answers], max(pause_s for _, pause_s in answers)

    def fails(self, on_piece):
        """What a client gets of a stream that is cut; None: it was whole."""
        try:
            self.ask(REQUESTS[0], on_piece)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            return type(error).__name__
        return None


def text_of(choice):
    message = getattr(choice, "delta", None) or getattr(choice, "message", None)
    return (message.content if message else choice.text) or ""


def at(number, act):
    return lambda piece: act() if piece == number else None


def models(api):
    """What is listed, and what each model and none answers."""
    answers = {}
    for model in (MODEL, OTHER, "unknown"):
        try:
            body = COMPLETION | {"model": model, "max_tokens": 20}
            answers[model] = api.ask(("completions", body))[0]
        except openai.NotFoundError as error:
            answers[model] = error.message
    listed = httpx.get(f"{api.base_url}/v1/models", timeout=60).json()["data"]
    info = httpx.get(f"{api.base_url}/server_info", timeout=60).json()
    return {
        "listed": [(each["id"], each["max_model_len"]) for each in listed],
        "answers": answers,
        "info": [(each["model"], each["num_replicas"]) for each in info["models"]],
        "health": httpx.get(f"{api.base_url}/health", timeout=60).status_code,
    }


def lost_replica(api):
    """The only replica of a model dies, or one of two."""
    expected, _ = api.ask_all()
    before = pids(MODEL)
    answers, pause_s = api.ask_all(at(KILL_AFTER, lambda: kill(MODEL)))
    _, idle = until_idle()
    return {
        "expected": expected,
        "answers": answers,
        "pause_s": pause_s,
        "kv_utilization": idle["kv_utilization"],
        "killed": len(set(before) - set(pids(MODEL))),
    }


def leaving_client(api):
    """A client goes in the middle of a stream, another while it waits for a whole answer."""
    url = f"{api.base_url}/v1/completions"
    with httpx.stream("POST", url, json=LONG | STREAM, timeout=LIMIT_S) as answer:
        lines = answer.iter_lines()  # without which httpx hangs up
        first_line = next(lines)
        with_stream = load()["num_requests"]
    after_stream = until_idle()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(httpx.post, url, json=LONG, timeout=2)
        while not (with_whole := load()["num_requests"]) and not waiting.done():
            time.sleep(0.05)
        left = type(waiting.exception()).__name__
    return {
        "first_line": first_line,
        "left": left,
        "open": [with_stream, with_whole],
        "idle": [after_stream, until_idle()],
    }


def lost_front_end(api):
    """The front end dies while it streams."""
    other = threading.Thread(target=read_long_stream, args=[api])
    other.start()
    killed = {}

    def kill_front_end():
        killed["open"] = load()["num_requests"]
        kill(FRONT_END_NAME)
        killed["s"] = time.monotonic()

    error = api.fails(at(KILL_AFTER, kill_front_end))
    end_s = time.monotonic() - killed["s"]
    idle_s, idle = until_idle()
    other.join()
    return {
        "open": killed["open"],
        "error": error,
        "end_s": end_s,
        "idle_s": idle_s,
        "kv_utilization": idle["kv_utilization"],
    }


def read_long_stream(api):
    url = f"{api.base_url}/v1/completions"
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("POST", url, json=LONG | STREAM, timeout=LIMIT_S) as answer,
    ):
        for _ in answer.iter_lines():
            pass


def first_request(api):
    """There is no replica until a request comes."""
    before, listed = pids(MODEL), httpx.get(f"{api.base_url}/v1/models", timeout=60).json()
    info = httpx.get(f"{api.base_url}/server_info", timeout=60).json()
    answer, _ = api.ask(REQUESTS[0])
    return {
        "before": before,
        "listed": len(listed["data"]),
        "running": [each["num_replicas"] for each in info["models"]],
        "usage": answer[2],
        "after": [len(pids(MODEL)), len(pids(OTHER))],
    }


def redeployment(api):
    """Every deployment is replaced while clients stream; replicas get no time to finish."""
    expected, _ = api.ask_all()
    before = {name: pids(name) for name in (MODEL, OTHER, FRONT_END_NAME)}
    is_over = threading.Event()

    def keep_asking():
        rounds = []
        while not is_over.is_set():
            rounds.append(api.ask_all()[0])
        return rounds

    with ThreadPoolExecutor(1) as threads:
        rounds = threads.submit(keep_asking)
        try:
            time.sleep(1)  # into the first round
            deploy(max_ongoing_requests=500, graceful_shutdown_timeout_s=0)
            while any(set(pids(name)) & set(old) for name, old in before.items()):
                time.sleep(0.2)
        finally:
            is_over.set()
        return {"expected": expected, "rounds": rounds.result()}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        models,
        lost_replica,
        leaving_client,
        lost_front_end,
        first_request,
        redeployment,
    )
}


def main():
    deployment, *names = sys.argv[1:]
    logging.disable(logging.INFO)
    with local_serve(num_cpus=4) as base_url:
        deploy(**json.loads(deployment))
        api = Api(base_url)
        print(json.dumps({name: SCENARIOS[name](api) for name in names}))  # noqa: T201


if __name__ == "__main__":
    main()
