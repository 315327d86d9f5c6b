"""`gllm-ray bench front`: Ray Serve's two proxies before a model that costs next to nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from gllm_ray.bench.conditions import own_cpu_s, part_clocks, tree_cpu_s
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.request_load import RequestLoad, parse_workload, synthetic_workload
from gllm_ray.bench.request_run import run_requests
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.target import Target, TargetOptions, start_target
from gllm_ray.config import resolve_package_path

PROXIES = ("default", "haproxy")
_PROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_NUM_PROMPT_TOKENS = 16
_START_TIMEOUT_S = 300.0
# The demo model's layers, but one alone, and of random weights.
_MODEL_CHANGES = {"num_hidden_layers": 1}
_ARGS: dict[str, Any] = {
    "model": {"served_name": "front", "load_format": "dummy", "dtype": "float32"},
    "pipeline": {"num_stages": 1, "device": "cpu", "cpus_per_stage": 0.4},
    "kv_cache": {"kv_cache_bytes": "128MiB"},
}


async def bench_front(
    *,
    num_streams: Sequence[int],
    num_tokens: int,
    num_rounds: int,
    on_step: Callable[[str], None],
) -> Result:
    """Stream outputs through the default proxy and through HAProxy, in turns.

    Both services are there all the time, and the one that waits takes little CPU.

    Args:
        num_streams: Requests that stream at once, one run each.
        num_tokens: Output tokens of each.
        num_rounds: Of all of it.
        on_step: Told what is done next.

    Raises:
        PipelineError: A service did not become ready.
    """
    runs = []
    async with _services(on_step) as services:
        for number in range(num_rounds):
            for streams in num_streams:
                for proxy, service in services.items():
                    on_step(f"round {number + 1} of {num_rounds}: {streams} streams, {proxy}")
                    run = await _measure(service, _load(streams, num_tokens), number)
                    runs.append({"proxy": proxy, "num_streams": streams, "run": run})
    return make_result("front", num_tokens=num_tokens, runs=runs)


async def _measure(service: Target, load: RequestLoad, number: int) -> dict[str, Any]:
    assert service.pid is not None  # this process has started it
    await send_load(service.client.send, load.warm_up())
    clocks = part_clocks(service.pid) | {
        "service": partial(tree_cpu_s, service.pid),
        "client": own_cpu_s,
    }
    run = await run_requests(service.client.send, load.requests(number), load, clocks)
    return run.to_json()


def _load(num_streams: int, num_tokens: int) -> RequestLoad:
    workload = synthetic_workload(str(_NUM_PROMPT_TOKENS), str(num_tokens))
    return RequestLoad(
        workload=parse_workload(workload | {"num_requests": num_streams}),
        seed=0,
        max_concurrency=None,
        num_warmups=min(num_streams, 16),
        slo=None,
    )


@asynccontextmanager
async def _services(on_step: Callable[[str], None]) -> AsyncIterator[dict[str, Target]]:
    """The same service behind each proxy."""
    options = TargetOptions(extra_body={}, timeout_s=_START_TIMEOUT_S)
    with tempfile.TemporaryDirectory() as directory:
        file = _write_service(Path(directory))
        async with AsyncExitStack() as stack:
            services = {}
            for proxy in PROXIES:
                on_step(f"starting behind {proxy}")
                with _chosen(proxy):
                    services[proxy] = await stack.enter_async_context(
                        start_target(str(file), options)
                    )
            yield services


def _write_service(directory: Path) -> Path:
    """Write a model without weights and a Serve configuration of it."""
    demo = Path(resolve_package_path("package://gllm_ray/demo/model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, directory)
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | _MODEL_CHANGES), encoding="utf-8")
    args = _ARGS | {"model": _ARGS["model"] | {"path": str(directory)}}
    application = {
        "name": "front",
        "route_prefix": "/",
        "import_path": "gllm_ray.serving.app:build_app",
        "args": args,
    }
    serve = {"http_options": {"host": "127.0.0.1"}, "applications": [application]}
    file = directory / "front.yaml"
    file.write_text(yaml.safe_dump(serve), encoding="utf-8")
    return file


@contextmanager
def _chosen(proxy: str) -> Iterator[None]:
    """What is started within gets this proxy."""
    before = os.environ.get(_PROXY_SWITCH)
    os.environ[_PROXY_SWITCH] = "1" if proxy == "haproxy" else "0"
    try:
        yield
    finally:
        del os.environ[_PROXY_SWITCH]
        if before is not None:
            os.environ[_PROXY_SWITCH] = before
