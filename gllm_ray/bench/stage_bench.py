"""`gllm-ray bench stage`: the engine against its bare stages, on the same micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from gllm_ray.bench.bare_stages import BareTime, run_bare_stages
from gllm_ray.bench.conditions import watch_conditions
from gllm_ray.bench.engine_bench import CLOCKS
from gllm_ray.bench.engine_load import prompt_vocab_size
from gllm_ray.bench.recorded_service import RecordedReplay, RecordedService
from gllm_ray.bench.request_load import RequestLoad
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.service_profile import describe_service
from gllm_ray.config import ServiceConfig


async def bench_stage(
    config: ServiceConfig,
    load: RequestLoad,
    *,
    num_rounds: int,
    on_step: Callable[[str], None],
) -> Result:
    """Serve requests, then run the micro-batches that came of them through the stages alone.

    The stages alone run side by side, without Ray, scheduler, neighbours or clients. The slowest
    of them bounds the throughput of the pipeline; `served_over_bare` is the share that is reached.

    Args:
        config: What is served; this process has started the Ray cluster that it is connected to.
        load: What is sent.
        num_rounds: Of both, in turns; each starts its processes anew.
        on_step: Told what is done next.

    Raises:
        ConfigError: The model cannot be served as configured, or the workload is none.
        PipelineError: A process died, or a request failed.
    """
    rounds, setup = [], ""
    for number in range(num_rounds):
        on_step(f"round {number + 1} of {num_rounds}: serving")
        service = await RecordedService.start(config)
        try:
            group = service.group
            setup = describe_service(config, group.infos)
            vocab_size = prompt_vocab_size(config)
            await service.replay(load.warm_up(vocab_size=vocab_size))
            requests = load.requests(number, vocab_size=vocab_size)
            with watch_conditions(CLOCKS) as serving:
                served = await service.replay(requests, max_concurrency=load.max_concurrency)
        finally:
            await service.close()
        on_step(f"round {number + 1} of {num_rounds}: bare stages")
        with watch_conditions({}) as computing:
            bare = run_bare_stages(config, served.batches, num_blocks=group.num_blocks)
        rounds.append(
            _round(served, bare)
            | {"conditions": {"served": asdict(serving), "bare": asdict(computing)}}
        )
    return make_result(
        "stage",
        device=config.pipeline.device,
        target=config.model.name,
        setup=setup,
        load=load.to_json(),
        rounds=rounds,
        served_over_bare=median(each["served_over_bare"] for each in rounds),
    )


def _round(served: RecordedReplay, bare: Sequence[BareTime]) -> dict[str, Any]:
    num_tokens, served_s = served.seen.num_output_tokens, served.seen.wall_s
    bare_s = max(stage.wall_s for stage in bare)
    return {
        "num_micro_batches": len(served.batches),
        "served_tokens_per_s": num_tokens / served_s,
        "bare_tokens_per_s": num_tokens / bare_s,
        "served_s": served_s,
        "bare": [stage._asdict() for stage in bare],
        "served_over_bare": bare_s / served_s,
    }
