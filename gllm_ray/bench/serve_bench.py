"""`gllm-ray bench serve`: HTTP requests to a service."""

from functools import partial
from typing import TYPE_CHECKING

from gllm_ray.bench.conditions import CpuClock, own_cpu_s, tree_cpu_s
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.request_load import RequestLoad
from gllm_ray.bench.request_run import run_requests
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.target import Target, TargetOptions, start_target

if TYPE_CHECKING:
    from tokenizers import Tokenizer


async def bench_serve(
    text: str, options: TargetOptions, load: RequestLoad, tokenizer: "Tokenizer | None"
) -> Result:
    """Send requests to a service over HTTP.

    Args:
        text: The service; see `start_target`.
        options: Of the service.
        load: What is sent.
        tokenizer: Spells prompts as text; None: they are sent as token ids.

    Raises:
        ConfigError: There is no such service, or the workload is none.
        PipelineError: The service did not become ready.
    """
    warm_up, requests = load.warm_up(tokenizer=tokenizer), load.requests(0, tokenizer=tokenizer)
    async with start_target(text, options) as target:
        await send_load(target.client.send, warm_up)
        run = await run_requests(target.client.send, requests, load, http_clocks(service=target))
    return make_result("serve", target=text, load=load.to_json(), run=run.to_json())


def http_clocks(**targets: Target) -> dict[str, CpuClock]:
    """Of this process, and of those services whose processes are known."""
    clocks: dict[str, CpuClock] = {"client": own_cpu_s}
    for name, target in targets.items():
        if target.pid is not None:
            clocks[name] = partial(tree_cpu_s, target.pid)
    return clocks
