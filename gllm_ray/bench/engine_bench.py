"""`gllm-ray bench engine` and `offline`: the engine with its stages, and no HTTP."""

from pathlib import Path

from gllm_ray.bench.conditions import descendants_cpu_s, own_cpu_s
from gllm_ray.bench.engine_load import engine_sender, prompt_vocab_size, run_engine
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.request_load import RequestLoad
from gllm_ray.bench.request_run import RequestRun, run_requests
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.service_profile import describe_service
from gllm_ray.bench.stage_trace import write_stage_trace
from gllm_ray.config import ServiceConfig

# Ray's processes descend from the one that started it.
CLOCKS = {"service": descendants_cpu_s, "client": own_cpu_s}


async def bench_engine(
    benchmark: str, config: ServiceConfig, load: RequestLoad, trace: Path | None = None
) -> Result:
    """Start an engine and send it requests from this process.

    Args:
        benchmark: The name of the result.
        config: What is served; this process has started the Ray cluster that it is connected to.
        load: What is sent.
        trace: Write when each stage computed its latest micro-batches, and their hops, to this
            file, for Perfetto.

    Raises:
        ConfigError: The model cannot be served as configured, or the workload is none.
        PipelineError: A process of the engine died.
    """
    vocab_size = prompt_vocab_size(config)
    warm_up = load.warm_up(vocab_size=vocab_size)
    requests = load.requests(0, vocab_size=vocab_size)
    async with run_engine(config) as engine:
        send = engine_sender(engine.client)
        await send_load(send, warm_up)
        run: RequestRun = await run_requests(send, requests, load, CLOCKS)
        setup = describe_service(config, engine.replica.group.infos)
        if trace is not None:
            await write_stage_trace(engine.replica.group, trace)
    return make_result(
        benchmark,
        device=config.pipeline.device,
        target=config.model.name,
        setup=setup,
        load=load.to_json(),
        run=run.to_json(),
    )
