"""Micro-batches as actor calls, one for each stage, whose refs Ray chains."""

import asyncio
from collections import deque

import ray
from ray.exceptions import RayError

from gllm_ray.messages import MicroBatch
from gllm_ray.stages.control_plane import Failed
from gllm_ray.stages.heartbeat import name_stage
from gllm_ray.stages.metadata import MetadataEncoder
from gllm_ray.stages.ray_errors import translate_ray_error
from gllm_ray.stages.stage_group import StageGroup

# How long a failed pipeline waits for the survivors' steps.
_DRAIN_TIMEOUT_S = 1.0
_LOOK_S = 0.1  # until an answer that is there has come


class RefChain:
    """The `ControlPlane` of actor calls.

    The object ref of a stage's call is an argument of the next stage's call, so Ray carries order
    and failures down the chain. Where a micro-batch continues another, the ref of that one's last
    call closes the ring, and its tokens reach the first stage without waiting for this process to
    see them.

    Args:
        group: Connected stages.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._encoder = MetadataEncoder()
        self._in_flight: deque[tuple[int, list[ray.ObjectRef]]] = deque()

    def submit(self, batch: MicroBatch) -> None:
        """See `ControlPlane`."""
        metadata = self._encoder.encode(batch)  # once for all stages
        ref, refs = self._source_of(batch), []
        for stage in self._group.stages:
            ref = stage.step.remote(self._group.epoch, metadata, ref)
            refs.append(ref)
        self._in_flight.append((batch.batch_id, refs))

    async def next_answer(self) -> tuple[int, list[object]]:
        """See `ControlPlane`."""
        in_flight = self._in_flight  # `end` may begin another while this waits
        batch_id, refs = in_flight[0]
        try:
            answer = await refs[-1]
        except RayError as error:
            raise translate_ray_error(error) from error
        in_flight.popleft()
        return batch_id, answer

    @property
    def oldest(self) -> int | None:
        """See `ControlPlane`."""
        return self._in_flight[0][0] if self._in_flight else None

    async def first_silent(self) -> int:
        """See `ControlPlane`."""
        _, refs = self._in_flight[0]
        for stage_id, ref in enumerate(refs[:-1]):
            try:
                async with asyncio.timeout(_LOOK_S):
                    await ref
            except (TimeoutError, RayError):
                return stage_id
        return len(refs) - 1

    async def end(self) -> list[Failed]:
        """Consume every ref in flight: survivors fall idle, and no error stays unread.

        Returns:
            The steps that failed, in their order: a stage's own fails before those that wait for
            it.
        """
        steps = {
            asyncio.ensure_future(ref): stage_id
            for _, refs in self._in_flight
            for stage_id, ref in enumerate(refs)
        }
        if not steps:
            return []
        done, late = await asyncio.wait(steps, timeout=_DRAIN_TIMEOUT_S)
        for step in late:
            step.cancel()
        self._in_flight = deque()
        failed = ((i, step.exception()) for step, i in steps.items() if step in done)
        return [
            Failed(i, translate_ray_error(error, name_stage(self._group.infos[i])))
            for i, error in failed
            if error is not None
        ]

    def _source_of(self, batch: MicroBatch) -> ray.ObjectRef | None:
        """What the last stage answers to the micro-batch that this one continues."""
        if batch.continues is None:
            return None
        return next(refs[-1] for batch_id, refs in self._in_flight if batch_id == batch.continues)
