"""Stages without Ray, scheduler or neighbours: each in a process, through given micro-batches."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch
from gllm_ray.stages.placement import stage_environment

_NUM_WARMUPS = 8  # of the micro-batches
_STOP_TIMEOUT_S = 10.0


class BareTime(NamedTuple):
    """How long a stage took for all micro-batches.

    Attributes:
        wall_s: Seconds that passed.
        cpu_s: CPU seconds of its process; on CPU, fewer than its threads times `wall_s` if others
            used its cores.
    """

    wall_s: float
    cpu_s: float


def run_bare_stages(
    config: ServiceConfig, batches: Sequence[MicroBatch], *, num_blocks: int
) -> list[BareTime]:
    """How long each stage takes for the same micro-batches, all of them side by side.

    No stage waits for another: hidden states are made up, and nothing is sent.

    Args:
        config: The service.
        batches: What to compute, in order.
        num_blocks: KV blocks of each stage.

    Returns:
        The time of each stage.

    Raises:
        PipelineError: A stage failed; its process tells why on standard error.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for stage_id in range(config.pipeline.num_stages):
            pipe, end = context.Pipe()
            process = context.Process(
                target=_run_stage, args=(config, stage_id, num_blocks, end), daemon=True
            )
            process.start()
            end.close()
            pipes.append(pipe)
            processes.append(process)
        _receive_all(pipes)  # all are loaded
        for pipe in pipes:
            pipe.send(batches)
        _receive_all(pipes)  # all are warm
        for pipe in pipes:
            pipe.send(None)
        return _receive_all(pipes)
    finally:
        for process in processes:
            process.terminate()
            process.join(_STOP_TIMEOUT_S)


def _receive_all(pipes: Sequence[Connection]) -> list[Any]:
    answers = []
    for stage_id, pipe in enumerate(pipes):
        try:
            answers.append(pipe.recv())
        except EOFError:
            raise PipelineError(f"bare stage {stage_id} ended; see its traceback above") from None
    return answers


def _gpu_of(config: ServiceConfig, stage_id: int) -> str:
    """The GPU of a stage, of those that this process may use."""
    index = stage_id // int(1 / config.pipeline.gpus_per_stage)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def _run_stage(config: ServiceConfig, stage_id: int, num_blocks: int, pipe: Connection) -> None:
    """Load a stage, warm it up, and run it; an answer after each, the last one a `BareTime`."""
    os.environ |= stage_environment(config.pipeline)  # torch reads it when it is imported
    if config.pipeline.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpu_of(config, stage_id)
    import torch

    from gllm_ray.stages.worker import StageWorker

    worker = StageWorker(config, stage_id)
    worker.load()
    worker.allocate_kv_cache(num_blocks)
    pipe.send(None)
    batches: Sequence[MicroBatch] = pipe.recv()
    hidden = None
    if not worker.is_first:
        num_rows = max(batch.num_tokens for batch in batches)
        hidden = torch.randn(num_rows, worker.hidden_size).to(worker.device, worker.dtype)

    any_tokens = (0,) * max(len(batch.sequences) for batch in batches)

    def run(some: Sequence[MicroBatch]) -> None:
        for batch in some:
            received = None if hidden is None else hidden[: batch.num_tokens]
            worker.execute(batch, received, any_tokens if worker.is_first else ())
        if worker.device.type == "cuda":
            torch.cuda.synchronize()

    run(batches[:_NUM_WARMUPS])
    pipe.send(None)
    pipe.recv()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    run(batches)
    pipe.send(BareTime(time.perf_counter() - start_s, time.process_time() - start_cpu_s))
