"""`gllm-ray bench recovery`: what the death of a stage costs running streams, phase by phase."""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.bench.conditions import watch_conditions
from gllm_ray.bench.engine_load import (
    RunningEngine,
    prompt_vocab_size,
    run_engine,
    to_generation_request,
)
from gllm_ray.bench.request_load import RequestLoad, parse_workload, synthetic_workload
from gllm_ray.bench.result_file import Result, make_result
from gllm_ray.bench.service_profile import describe_service
from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError

_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPhases:
    """What the death of a stage cost, in seconds; the phases follow each other.

    Attributes:
        stage_id: The stage.
        detect_s: From its death until its owner began to repair.
        restart_s: Until the process of the new stage was up.
        reload_s: Until it had its weights and its KV cache.
        reconnect_s: Until all stages were connected anew.
        prefill_s: Until the next token came: prompts and output so far were computed again.
        pause_s: The longest that a stream waited for its next token.
    """

    stage_id: int
    detect_s: float
    restart_s: float
    reload_s: float
    reconnect_s: float
    prefill_s: float
    pause_s: float


class _Streams:
    """Requests one after the other on each of some streams, and when their tokens come."""

    def __init__(
        self, engine: RunningEngine, load: RequestLoad, vocab_size: int, num_streams: int
    ) -> None:
        self.num_finished = 0
        self._engine = engine
        self._load = load
        self._vocab_size = vocab_size
        self._tokens_s: list[list[float]] = [[] for _ in range(num_streams)]

    async def run(self, stream_id: int) -> None:
        """Send requests until this is cancelled.

        Raises:
            PipelineError: One did not get all of its tokens.
        """
        tokens_s = self._tokens_s[stream_id]
        for repeat in itertools.count():
            request = self._load.requests(repeat, vocab_size=self._vocab_size)[stream_id]
            num_tokens = 0
            async for events in self._engine.client.generate(to_generation_request(request)):
                num_tokens += sum(event.token_id is not None for event in events)
                tokens_s.append(time.monotonic())
            if num_tokens != request.num_output_tokens:
                raise PipelineError(
                    f"a request ended with {num_tokens} tokens, not {request.num_output_tokens}"
                )
            self.num_finished += 1

    async def until_all_had_tokens(self, since_s: float) -> None:
        """Return when each stream has got a token since then."""
        for tokens_s in self._tokens_s:
            while not tokens_s or tokens_s[-1] <= since_s:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    def first_after(self, moment_s: float) -> float:
        """When the first token came after a moment."""
        return min(t for tokens_s in self._tokens_s for t in tokens_s if t > moment_s)

    def longest_pause_s(self, since_s: float) -> float:
        """The longest time between two tokens of a stream, the latter of which came since then."""
        return max(
            after - before
            for tokens_s in self._tokens_s
            for before, after in itertools.pairwise(tokens_s)
            if after > since_s
        )


async def bench_recovery(
    config: ServiceConfig,
    *,
    num_streams: int,
    input_len: int,
    output_len: int,
    num_kills: int,
    calm_s: float,
    on_step: Callable[[str], None],
) -> Result:
    """Kill stages in turn while requests run, and see to it that each gets all of its tokens.

    Args:
        config: What is served; this process has started the Ray cluster that it is connected to.
        num_streams: Requests at once.
        input_len: Tokens of their prompts.
        output_len: Tokens of their outputs.
        num_kills: How many stages die.
        calm_s: From one recovery to the next death.
        on_step: Told what is done next.

    Raises:
        ConfigError: The model cannot be served as configured.
        PipelineError: The pipeline did not recover, or a request did not get all of its tokens.
    """
    # Each death is the first in a row, and repaired without a delay.
    recovery = config.recovery.model_copy(update={"calm_s": calm_s / 2})
    config = config.model_copy(update={"recovery": recovery})
    workload = synthetic_workload(str(input_len), str(output_len))
    load = RequestLoad(
        workload=parse_workload(workload | {"num_requests": num_streams}),
        seed=0,
        max_concurrency=None,
        num_warmups=0,
        slo=None,
    )
    async with run_engine(config) as engine:
        streams = _Streams(engine, load, prompt_vocab_size(config), num_streams)
        running = asyncio.gather(*map(streams.run, range(num_streams)))
        killing = asyncio.create_task(
            _kill_in_turn(engine.replica, streams, num_kills, calm_s, on_step)
        )
        tasks: list[asyncio.Future[Any]] = [running, killing]
        try:
            with watch_conditions({}) as conditions:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running  # raises why the streams ended
            recoveries = await killing
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        setup = describe_service(config, engine.replica.group.infos)
    return make_result(
        "recovery",
        device=config.pipeline.device,
        target=config.model.name,
        setup=setup,
        num_streams=num_streams,
        input_len=input_len,
        output_len=output_len,
        num_finished=streams.num_finished,
        conditions=asdict(conditions),
        recoveries=[asdict(each) for each in recoveries],
    )


async def _kill_in_turn(
    replica: PipelineReplica,
    streams: _Streams,
    num_kills: int,
    calm_s: float,
    on_step: Callable[[str], None],
) -> list[RecoveryPhases]:
    num_stages, recoveries = len(replica.group.stages), []
    await streams.until_all_had_tokens(0.0)
    for number in range(num_kills):
        await asyncio.sleep(calm_s)
        stage_id = number % num_stages
        on_step(f"kill {number + 1} of {num_kills}: stage {stage_id}")
        recoveries.append(await _kill(replica, streams, stage_id))
    return recoveries


async def _kill(replica: PipelineReplica, streams: _Streams, stage_id: int) -> RecoveryPhases:
    killed_s = time.monotonic()
    ray.kill(replica.group.stages[stage_id])
    while (repair := replica.latest_repair) is None or repair.begun_s < killed_s:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    await streams.until_all_had_tokens(repair.connected_s)
    return RecoveryPhases(
        stage_id=stage_id,
        detect_s=repair.begun_s - killed_s,
        restart_s=repair.restarted_s - repair.begun_s,
        reload_s=repair.reloaded_s - repair.restarted_s,
        reconnect_s=repair.connected_s - repair.reloaded_s,
        prefill_s=streams.first_after(repair.connected_s) - repair.connected_s,
        pause_s=streams.longest_pause_s(repair.connected_s),
    )
