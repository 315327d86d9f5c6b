"""`gllm-ray bench compare`: two services in turns, on the same requests."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.paired_ratios import Pair, paired_ratios
from gllm_ray.bench.request_load import RequestLoad
from gllm_ray.bench.request_run import run_requests
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.serve_bench import http_clocks
from gllm_ray.bench.target import TargetOptions, start_target

if TYPE_CHECKING:
    from tokenizers import Tokenizer


async def bench_compare(
    a: tuple[str, TargetOptions],
    b: tuple[str, TargetOptions],
    load: RequestLoad,
    tokenizer: "Tokenizer | None",
    *,
    num_pairs: int,
    on_step: Callable[[str], None],
) -> Result:
    """Run A, B, A, B, ...: what disturbs the machine for long disturbs both.

    A service is started for its turn and ended after it: beside another, even an idle Ray would
    take some 7 % of two cores. Each pair gets prompts of its own, so that no service finds those of
    an earlier one in its cache.

    Args:
        a: A service, see `start_target`, and its options.
        b: The one to compare it with.
        load: What is sent each time, after its warm-up.
        tokenizer: Spells prompts as text; None: they are sent as token ids.
        num_pairs: Runs of each.
        on_step: Told what is done next.

    Raises:
        ConfigError: There is no such service, or the workload is none.
        PipelineError: A service did not become ready.
    """
    warm_up = load.warm_up(tokenizer=tokenizer)
    pairs = []
    for number in range(num_pairs):
        requests = load.requests(number, tokenizer=tokenizer)
        runs = []
        for name, service in (("a", a), ("b", b)):
            on_step(f"pair {number + 1} of {num_pairs}: {name.upper()}")
            async with start_target(*service) as target:
                clocks = http_clocks(**{name: target})
                await send_load(target.client.send, warm_up)
                runs.append(await run_requests(target.client.send, requests, load, clocks))
        pairs.append(Pair(*runs))
    return make_result(
        "compare",
        a=a[0],
        b=b[0],
        load=load.to_json(),
        pairs=[{"a": pair.a.to_json(), "b": pair.b.to_json()} for pair in pairs],
        ratios={name: asdict(ratio) for name, ratio in paired_ratios(pairs).items()},
    )
