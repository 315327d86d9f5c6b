"""`gllm-ray bench compare`: two services in turns, on the same requests."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.paired_ratios import Pair, paired_ratios
from gllm_ray.bench.request_load import RequestLoad
from gllm_ray.bench.request_run import run_requests
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.serve_bench import http_clocks
from gllm_ray.bench.standing_still import standing_still
from gllm_ray.bench.target import TargetOptions, start_target

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a service that stood still does first, such as what its clocks call overdue.
_SETTLING_S = 1.0


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

    A service that was started for this stands still while the other one is measured: an idle Ray
    takes some 7 % of two cores. Each pair gets prompts of its own, so that no service finds those
    of an earlier one in its cache.

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
    on_step(f"starting {a[0]}")
    async with start_target(*a) as target_a:
        on_step(f"starting {b[0]}")
        async with start_target(*b) as target_b:
            clocks = http_clocks(a=target_a, b=target_b)
            for number in range(num_pairs):
                requests = load.requests(number, tokenizer=tokenizer)
                runs = []
                turns = (("A", target_a, target_b), ("B", target_b, target_a))
                for name, target, other in turns:
                    on_step(f"pair {number + 1} of {num_pairs}: {name}")
                    with standing_still(other.pid if other.is_started else None):
                        await asyncio.sleep(_SETTLING_S)
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
