"""All stages in one process: the pipeline without a cluster."""

import asyncio
import logging
from collections import deque
from typing import Self

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, MicroBatchResult, StageInfo
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.partition import describe_stage, size_kv_cache
from gllm_ray.stages.stopwatch import Stopwatch, event_type
from gllm_ray.stages.worker import StageWorker

logger = logging.getLogger(__name__)


class LocalPipeline:
    """Implements `Pipeline`; a micro-batch runs through all stages when its result is awaited.

    Attributes:
        stages: What each stage holds.
        num_blocks: KV blocks of every stage.
    """

    def __init__(
        self, workers: tuple[StageWorker, ...], stages: tuple[StageInfo, ...], num_blocks: int
    ) -> None:
        self._workers = workers
        self._stopwatches = tuple(
            Stopwatch(stage_id, event_type(worker.device.type))
            for stage_id, worker in enumerate(workers)
        )
        self._submitted: deque[MicroBatch] = deque()
        self._sampled: dict[int, tuple[int, ...]] = {}  # of micro-batches that others continue
        self._failure: PipelineError | None = None
        self.stages = stages
        self.num_blocks = num_blocks

    @classmethod
    def start(cls, config: ServiceConfig) -> Self:
        """Load every stage and reserve the KV cache that fits on all of them.

        Raises:
            ConfigError: The model cannot be served with this configuration.
        """
        num_stages, share = config.pipeline.num_stages, config.pipeline.gpus_per_stage
        # On a GPU they all take memory of the same one.
        together = config.pipeline.model_copy(update={"gpus_per_stage": share / num_stages})
        config = config.model_copy(update={"pipeline": together})
        workers = tuple(StageWorker(config, stage_id) for stage_id in range(num_stages))
        stages = tuple(worker.load() for worker in workers)
        for stage in stages:
            logger.info("%s", describe_stage(stage))
        max_model_len = open_checkpoint(config.model).max_model_len
        num_blocks = size_kv_cache(stages, config.kv_cache.block_size, max_model_len)
        for worker in workers:
            worker.allocate_kv_cache(num_blocks)
        return cls(workers, stages, num_blocks)

    def submit(self, batch: MicroBatch) -> None:
        """Queue a micro-batch."""
        self._submitted.append(batch)

    async def next_result(self) -> MicroBatchResult:
        """Run the oldest queued micro-batch through all stages.

        Raises:
            PipelineError: A stage failed; no later call succeeds.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        batch = self._submitted.popleft()
        try:
            result = await asyncio.to_thread(self._run, batch)
        except Exception as error:
            self._failure = PipelineError(f"micro-batch {batch.batch_id} failed: {error!r}")
            raise self._failure from error
        self._sampled[batch.batch_id] = result.token_ids
        needed = {waiting.continues for waiting in self._submitted}
        self._sampled = {key: self._sampled[key] for key in needed & self._sampled.keys()}
        return result

    async def close(self) -> None:
        """Drop the stages; results not yet returned are lost."""
        self._failure = PipelineError("the pipeline is closed")
        self._submitted.clear()
        self._workers = ()

    def _run(self, batch: MicroBatch) -> MicroBatchResult:
        output, times = None, []
        sampled = () if batch.continues is None else self._sampled[batch.continues]
        for worker, stopwatch in zip(self._workers, self._stopwatches, strict=True):
            with stopwatch.measure(batch.batch_id):
                output = worker.execute(batch, output, sampled)
            times += stopwatch.take()
        return MicroBatchResult(
            batch_id=batch.batch_id, **output._asdict(), stage_times=tuple(times)
        )
