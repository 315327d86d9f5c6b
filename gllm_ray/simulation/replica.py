"""One replica in virtual time: the serving scheduler over stages that are simulated."""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import NamedTuple

from gllm_ray.autoscaling import ReplicaSignals, SignalMeter
from gllm_ray.errors import InvalidRequestError, OverloadedError
from gllm_ray.messages import (
    EngineLoad,
    FinishReason,
    MicroBatch,
    MicroBatchResult,
    ScheduledSequence,
    StageTime,
    TokenEvent,
)
from gllm_ray.scheduling import Scheduler
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.metrics import BatchMetrics, IdleCause, RequestMetrics, RequestProgress
from gllm_ray.simulation.simulated_request import (
    FILLER_TOKEN_ID,
    SimulatedRequest,
    output_token_id,
    to_generation_request,
)
from gllm_ray.simulation.virtual_pipeline import VirtualPipeline


class FlyingBatch(NamedTuple):
    """A micro-batch on its way through the stages.

    Attributes:
        batch: The micro-batch.
        num_decodes: How many of its sequences are decodes; they come first.
        stage_times: What its stages will have measured.
        epoch: That of the replica when it was submitted.
    """

    batch: MicroBatch
    num_decodes: int
    stage_times: tuple[StageTime, ...]
    epoch: int


# Called with the time at which the result of a micro-batch reaches the scheduler of a replica.
ExpectResult = Callable[[float, "SimulatedReplica", FlyingBatch], None]
# Called when a request has ended, with what its router said that it costs.
NoteEnd = Callable[["SimulatedReplica", float], None]


class SimulatedReplica:
    """Drives a scheduler as the engine does: after each call it fills the pipeline.

    The scheduler is one thread. While it forms a micro-batch, results wait until `busy_until_s`,
    and so does the next micro-batch; who calls sees to that.

    Args:
        scheduler: The one that serves.
        pipeline: Its stages.
        requests: What becomes of requests, those of all replicas.
        batches: Told of every micro-batch, those of all replicas.
        ideal: Told of the work of every micro-batch.
        expect_result: Has `on_result` called when a micro-batch is through.
        ready_s: When the replica takes its first request.

    Attributes:
        busy_until_s: When the scheduler is next free, and no stage is being replaced.
        ready_s: When the replica takes its first request.
        last_end_s: When a request or a micro-batch last ended.
        stopped_s: When it was told that no more requests will come; it ends those that it holds.
        alarm_s: When it is next asked which requests have waited too long.
        is_fill_due: Whether it is to be filled once its scheduler is free.
        epoch: How often it lost its stages; results of an earlier epoch do not come.
        metrics: What its stages do.
        decisions: Every micro-batch, if the caller makes it a list.
        note_end: Told of every request that ends, if the caller sets it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: VirtualPipeline,
        requests: RequestMetrics,
        batches: BatchMetrics,
        ideal: IdealWork,
        expect_result: ExpectResult,
        ready_s: float = 0.0,
    ) -> None:
        self.busy_until_s = ready_s
        self.ready_s = ready_s
        self.last_end_s = 0.0
        self.stopped_s = inf
        self.alarm_s = inf
        self.is_fill_due = False
        self.epoch = 0
        self.metrics = pipeline.metrics
        self.decisions: list[MicroBatch] | None = None
        self.note_end: NoteEnd | None = None
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._requests = requests
        self._batches = batches
        self._ideal = ideal
        self._expect_result = expect_result
        self._progress: dict[str, RequestProgress] = {}
        self._open_ended: dict[str, SimulatedRequest] = {}  # whose output ends by itself
        self._start_s = ready_s
        self._idle_since_s: float | None = ready_s  # without requests, or without a stage
        self._meter = SignalMeter()

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._progress)

    def is_running(self, now_s: float) -> bool:
        """Whether it has started, and has not been stopped or still holds requests."""
        return now_s >= self._start_s and (now_s < self.stopped_s or self.num_requests > 0)

    def has_gone(self, now_s: float) -> bool:
        """Whether it was stopped, and has ended what it held, and what it submitted ahead of that.

        Of a request that ends by itself the next step may be under way already.
        """
        is_idle = self.num_requests == 0 and self._scheduler.num_in_flight == 0
        return self.stopped_s <= now_s and is_idle

    @property
    def next_deadline_s(self) -> float | None:
        """When a request may next expire."""
        return self._scheduler.next_deadline_s

    def load(self) -> EngineLoad:
        """How much its scheduler holds, and what it has counted."""
        return self._scheduler.load()

    def read_signals(self, now_s: float) -> ReplicaSignals:
        """What an autoscaler is told of it."""
        return self._meter.read(self.load(), now_s)

    def add(
        self, index: int, request: SimulatedRequest, now_s: float, cost_tokens: float = 0.0
    ) -> None:
        """A request has come; one that is refused ends at once."""
        progress = RequestProgress(
            arrival_s=request.arrival_s,
            num_prompt_tokens=request.num_prompt_tokens,
            cost_tokens=cost_tokens,
        )
        try:
            self._scheduler.add(to_generation_request(request, index), now_s)
        except InvalidRequestError as error:
            self._requests.first_error = self._requests.first_error or str(error)
            self._end(progress, FinishReason.ERROR, now_s)
        except OverloadedError:
            self._end(progress, FinishReason.EXPIRED, now_s)
        else:
            self._note_idle(now_s)
            self._progress[str(index)] = progress
            if request.max_tokens is not None:
                self._open_ended[str(index)] = request

    def expire(self, now_s: float) -> None:
        """End the requests that have waited too long."""
        self._note_idle(now_s)
        self._take(self._scheduler.expire(now_s), now_s)

    def fill(self, now_s: float) -> None:
        """Form micro-batches until the scheduler has no more."""
        timing, formed_s = self._pipeline.timing, now_s
        self._note_idle(now_s)
        if self._progress:
            self._idle_since_s = None
        self._pipeline.advance(now_s)
        while (batch := self._scheduler.schedule(formed_s)) is not None:
            load, begun_s = self._scheduler.latest_load, formed_s
            formed_s += timing.schedule_s + timing.schedule_sequence_s * len(batch.sequences)
            self._pipeline.note_idle(begun_s, formed_s, IdleCause.SCHEDULER)
            self._note_chunks(batch.sequences[load.num_decodes :], formed_s)
            self._batches.add(load)
            self._ideal.add_batch(load)
            result_s, times = self._pipeline.submit(batch.batch_id, load, formed_s, batch.continues)
            flying = FlyingBatch(batch, load.num_decodes, times, self.epoch)
            self._expect_result(result_s, self, flying)
            if self.decisions is not None:
                self.decisions.append(batch)
        self.busy_until_s = formed_s
        self.metrics.kv_utilization.set(self._scheduler.kv_utilization, now_s)

    def on_result(self, flying: FlyingBatch, now_s: float) -> None:
        """The oldest micro-batch is through: commit it, and fill the pipeline again."""
        self.last_end_s = now_s
        result = MicroBatchResult(
            batch_id=flying.batch.batch_id,
            token_ids=self._sample(flying),
            stage_times=flying.stage_times,
        )
        self._take(self._scheduler.commit(result, now_s), now_s)
        self.fill(now_s)

    def lose_stage(self, now_s: float, recovery_s: float) -> None:
        """A stage dies: until it is replaced all requests wait, and then are prefilled again."""
        self.epoch += 1
        self.busy_until_s = max(self.busy_until_s, now_s + recovery_s)
        self._note_idle(now_s)
        self._idle_since_s = now_s
        self._pipeline.restart(now_s)
        self._take(self._scheduler.requeue_all().events, now_s)
        self.metrics.kv_utilization.set(self._scheduler.kv_utilization, now_s)

    def close(self, end_s: float) -> float:
        """Account for the time up to its end, or to that of the simulation if that is earlier.

        Returns:
            How long it ran.
        """
        end_s = max(self._start_s, min(end_s, max(self.stopped_s, self.last_end_s)))
        self._note_idle(end_s)
        self._pipeline.close(end_s)
        self.metrics.kv_utilization.set(self._scheduler.kv_utilization, end_s)
        return end_s - self._start_s

    def _note_idle(self, now_s: float) -> None:
        """Tell why nothing was computed up to now, if nothing is; more idle time may follow."""
        if self._idle_since_s is not None:
            cause = IdleCause.REPAIR if self._progress else IdleCause.NO_WORK
            self._pipeline.note_idle(self._idle_since_s, now_s, cause)
            self._idle_since_s = now_s

    def _note_chunks(self, chunks: Iterable[ScheduledSequence], now_s: float) -> None:
        for chunk in chunks:
            progress = self._progress[self._scheduler.request_of(chunk.seq_id).request_id]
            progress.num_preemptions = chunk.epoch
            if progress.first_scheduled_s is None:
                progress.first_scheduled_s = now_s

    def _sample(self, flying: FlyingBatch) -> tuple[int, ...]:
        sequences = flying.batch.sequences
        if not self._open_ended:  # no token means anything
            chunks = sequences[flying.num_decodes :]
            num_last_chunks = sum(chunk.sampling is not None for chunk in chunks)
            return (FILLER_TOKEN_ID,) * (flying.num_decodes + num_last_chunks)
        request_of = self._scheduler.request_of
        return tuple(
            self._token_id(request_of(item.seq_id).request_id)
            for item in sequences
            if item.sampling is not None
        )

    def _token_id(self, request_id: str) -> int:
        request = self._open_ended.get(request_id)
        if request is None:
            return FILLER_TOKEN_ID
        return output_token_id(request, self._progress[request_id].num_output_tokens)

    def _take(self, events: Sequence[TokenEvent], now_s: float) -> None:
        """Note what became of requests."""
        progress_of = self._progress
        self._requests.on_tokens(
            [progress_of[event.request_id] for event in events if event.token_id is not None],
            now_s,
        )
        for event in events:
            if event.finish_reason is not None:
                self._open_ended.pop(event.request_id, None)
                self._end(progress_of.pop(event.request_id), event.finish_reason, now_s)
        if not progress_of and self._idle_since_s is None:
            self._idle_since_s = now_s

    def _end(self, progress: RequestProgress, reason: FinishReason, now_s: float) -> None:
        self._requests.on_end(progress, reason)
        if self.note_end is not None:
            self.note_end(self, progress.cost_tokens)
        self.last_end_s = now_s
