"""Micro-batches as messages to stages that read them in a loop, one long actor call for each stage.

Ray tells of a dead stage, whose call fails then. All else goes from process to process.
"""

import asyncio
from collections import deque

import ray

from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, StepUnderWay
from gllm_ray.stages.control_plane import Failed
from gllm_ray.stages.heartbeat import name_stage
from gllm_ray.stages.inbox import Inbox, Outbox
from gllm_ray.stages.metadata import MetadataEncoder
from gllm_ray.stages.ray_errors import translate_ray_error
from gllm_ray.stages.stage_group import StageGroup
from gllm_ray.stages.step_messages import ANSWER, STOP, StepFailure, batch_message

# How long a failed pipeline waits for the survivors' steps.
_STOP_TIMEOUT_S = 1.0
# Until a busy stage has told how far it is.
_ASK_TIMEOUT_S = 2.0
# Until a failure has come down a chain whose stages compute nothing.
_FAILURE_TIMEOUT_S = 1.0


class DirectLoop:
    """The `ControlPlane` of messages; made and used within one event loop.

    A step's failure goes down the chain in place of its answer, so it comes after the answers to
    the micro-batches before it, as it does with refs.

    Args:
        group: Connected stages that have inboxes.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._encoder = MetadataEncoder()
        self._in_flight: deque[int] = deque()
        self._come: asyncio.Queue[tuple[int, list[object]] | Failed] = asyncio.Queue()
        self._failed: list[Failed] = []
        self._is_ended = False
        self._awaited_failure: asyncio.Task[None] | None = None
        self._inbox = Inbox(ray.util.get_node_ip_address())
        self._outboxes = [Outbox(address) for address in group.inboxes]
        self._loop = asyncio.get_running_loop()
        self._runs = self._start_stages()
        self._loop.add_reader(self._inbox.fileno(), self._read)

    def submit(self, batch: MicroBatch) -> None:
        """See `ControlPlane`."""
        metadata = self._encoder.encode(batch)  # once for all stages
        message = batch_message(batch.batch_id, batch.continues, metadata)
        for outbox in self._outboxes:
            outbox.write(message)
        self._in_flight.append(batch.batch_id)

    async def next_answer(self) -> tuple[int, list[object]]:
        """See `ControlPlane`."""
        come = await self._come.get()
        if isinstance(come, Failed):
            self._failed.append(come)
            raise come.error
        expected = self._in_flight.popleft()
        if come[0] != expected:
            raise PipelineError(f"the answer to micro-batch {come[0]} came, and not to {expected}")
        return come

    @property
    def oldest(self) -> int | None:
        """See `ControlPlane`."""
        return self._in_flight[0] if self._in_flight else None

    async def first_silent(self) -> int:
        """See `ControlPlane`."""
        oldest = self._in_flight[0]
        asked = [
            asyncio.wait_for(stage.latest_computed.remote(), _ASK_TIMEOUT_S)
            for stage in self._group.stages[:-1]
        ]
        for stage_id, latest in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
            if isinstance(latest, BaseException) or latest < oldest:
                return stage_id
        return len(self._group.stages) - 1

    async def end(self) -> list[Failed]:
        """End the stages' loops.

        Returns:
            The stages that died or took no more steps; then the failure that was noticed, if it is
            another.
        """
        if self._is_ended:
            return self._failed
        self._is_ended = True
        if self._awaited_failure is not None:
            self._awaited_failure.cancel()
        self._loop.remove_reader(self._inbox.fileno())
        self._inbox.close()
        for outbox in self._outboxes:
            outbox.write([STOP])
            outbox.close()
        done, late = await asyncio.wait(self._runs, timeout=_STOP_TIMEOUT_S)
        for run in late:
            run.cancel()
        lost = [failed for run in done if (failed := self._failure_of(run)) is not None]
        return sorted(lost, key=lambda failed: failed.stage_id) + self._failed

    def _start_stages(self) -> dict[asyncio.Future[StepFailure | None], int]:
        """The running loop of each stage."""
        group = self._group
        last = [self._inbox.address, *group.inboxes[: int(group.ring)]]
        onward = [*([address] for address in group.inboxes[1:]), last]
        runs = {}
        for stage_id, (stage, addresses) in enumerate(zip(group.stages, onward, strict=True)):
            run = asyncio.ensure_future(stage.run.remote(group.epoch, addresses))
            run.add_done_callback(self._on_end_of_run)
            runs[run] = stage_id
        return runs

    def _on_end_of_run(self, run: asyncio.Future[StepFailure | None]) -> None:
        if run.cancelled():
            return
        if (failed := self._failure_of(run)) is not None:
            self._come.put_nowait(failed)
        elif (failure := run.result()) is None or self._is_ended:
            return
        elif self._awaited_failure is None:  # the later stages' loops end of the same one
            failed = Failed(failure.stage_id, PipelineError(failure.reason))
            self._awaited_failure = self._loop.create_task(self._await_failure(failed))

    async def _await_failure(self, failed: Failed) -> None:
        """Tell of a failure whose own message is lost, and not before the answers ahead of it."""
        is_computing = True
        while is_computing:
            await asyncio.sleep(_FAILURE_TIMEOUT_S)
            later = self._group.stages[failed.stage_id + 1 :]
            asked = [
                asyncio.wait_for(stage.step_under_way.remote(), _ASK_TIMEOUT_S) for stage in later
            ]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            is_computing = any(isinstance(answer, StepUnderWay) for answer in answers)
        self._come.put_nowait(failed)

    def _failure_of(self, run: asyncio.Future[StepFailure | None]) -> Failed | None:
        if (error := run.exception()) is None:
            return None
        stage_id, infos = self._runs[run], self._group.infos
        name = name_stage(infos[stage_id]) if infos else f"stage {stage_id}"
        return Failed(stage_id, translate_ray_error(error, name))

    def _read(self) -> None:
        # Until none is left, because the file becomes readable only when one more comes.
        while (message := self._inbox.read_if_any()) is not None:
            kind, batch_id, *content = message
            if kind == ANSWER:
                self._come.put_nowait((batch_id, content[0]))
            else:
                stage_id, reason = content
                self._come.put_nowait(Failed(stage_id, PipelineError(reason)))
