"""One replica in virtual time: the serving scheduler over stages that are simulated."""

from collections.abc import Callable, Iterable

from gllm_ray.errors import InvalidRequestError, OverloadedError
from gllm_ray.messages import FinishReason, MicroBatch, MicroBatchResult, StageTime, TokenEvent
from gllm_ray.scheduling import Scheduler
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.metrics import (
    IdleCause,
    PipelineMetrics,
    RequestMetrics,
    RequestProgress,
)
from gllm_ray.simulation.simulated_request import (
    SimulatedRequest,
    output_token_id,
    to_generation_request,
)
from gllm_ray.simulation.virtual_pipeline import Timing, VirtualPipeline

# Called with the time of a result, the micro-batch and what its stages measured.
ExpectResult = Callable[[float, MicroBatch, tuple[StageTime, ...]], None]


class SimulatedReplica:
    """Drives a scheduler as the engine does: after each call it fills the pipeline.

    The scheduler is one thread. While it forms a micro-batch, whatever comes waits until
    `busy_until_s`; who calls sees to that.

    Args:
        scheduler: The one that serves.
        pipeline: Its stages.
        timing: Of the scheduler.
        metrics: What the stages do.
        requests: What becomes of requests, those of all replicas.
        ideal: Told of the work of every micro-batch.
        expect_result: Has `on_result` called when a micro-batch is through.
        ready_s: When the replica takes its first request.

    Attributes:
        busy_until_s: When the scheduler is next free.
        is_ready: It takes requests.
        epoch: How often it lost its stages; results of an earlier epoch do not come.
        metrics: What its stages do.
        decisions: Every micro-batch, if the caller makes it a list.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: VirtualPipeline,
        timing: Timing,
        metrics: PipelineMetrics,
        requests: RequestMetrics,
        ideal: IdealWork,
        expect_result: ExpectResult,
        ready_s: float = 0.0,
    ) -> None:
        self.busy_until_s = ready_s
        self.is_ready = True
        self.epoch = 0
        self.metrics = metrics
        self.decisions: list[MicroBatch] | None = None
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._timing = timing
        self._requests = requests
        self._ideal = ideal
        self._expect_result = expect_result
        self._progress: dict[str, tuple[SimulatedRequest, RequestProgress]] = {}
        self._idle_since_s: float | None = ready_s

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._progress)

    @property
    def next_deadline_s(self) -> float | None:
        """When a request may next expire."""
        return self._scheduler.next_deadline_s

    def add(self, index: int, request: SimulatedRequest, now_s: float) -> None:
        """A request has come; one that is refused ends at once."""
        progress = RequestProgress(
            arrival_s=request.arrival_s, num_prompt_tokens=request.num_prompt_tokens
        )
        try:
            self._scheduler.add(to_generation_request(request, index), now_s)
        except InvalidRequestError:
            self._requests.on_end(progress, FinishReason.ERROR)
        except OverloadedError:
            self._requests.on_end(progress, FinishReason.EXPIRED)
        else:
            self._progress[str(index)] = (request, progress)
            if self._idle_since_s is not None:
                self._pipeline.note_idle(self._idle_since_s, now_s, IdleCause.NO_WORK)
                self._idle_since_s = None

    def expire(self, now_s: float) -> None:
        """End the requests that have waited too long."""
        self._take(self._scheduler.expire(now_s), now_s)

    def fill(self, now_s: float) -> None:
        """Form micro-batches until the scheduler has no more."""
        busy_until_s = now_s
        while (batch := self._scheduler.schedule(busy_until_s)) is not None:
            timing, load = self._timing, self._scheduler.latest_load
            busy_until_s += timing.schedule_s + timing.schedule_sequence_s * len(batch.sequences)
            self._pipeline.note_idle(now_s, busy_until_s, IdleCause.SCHEDULER)
            self._note_chunks(batch, load, busy_until_s)
            self._ideal.add(load)
            result_s, times = self._pipeline.submit(batch.batch_id, load, busy_until_s)
            self._expect_result(result_s, batch, times)
            if self.decisions is not None:
                self.decisions.append(batch)
        self.busy_until_s = busy_until_s
        self.metrics.kv_utilization.set(self._scheduler.kv_utilization, busy_until_s)

    def on_result(self, batch: MicroBatch, times: tuple[StageTime, ...], now_s: float) -> None:
        """The oldest micro-batch is through: commit it, and fill the pipeline again."""
        result = MicroBatchResult(
            batch_id=batch.batch_id, token_ids=self._sample(batch), stage_times=times
        )
        self._take(self._scheduler.commit(result, now_s), now_s)
        self.fill(now_s)

    def lose_stage(self, now_s: float) -> None:
        """A stage dies: its requests end with an error, and nothing comes until `recover`."""
        self.epoch += 1
        self.is_ready = False
        self._pipeline.restart(now_s)
        self._take(self._scheduler.fail_all("a stage was lost"), now_s)
        self.metrics.kv_utilization.set(0.0, now_s)

    def recover(self) -> None:
        """The stages are there again."""
        self.is_ready = True

    def close(self, now_s: float) -> None:
        """Account for the time up to the end."""
        if self._idle_since_s is not None:
            self._pipeline.note_idle(self._idle_since_s, now_s, IdleCause.NO_WORK)
        self._pipeline.close(now_s)
        self.metrics.kv_utilization.set(self._scheduler.kv_utilization, now_s)

    def _note_chunks(self, batch: MicroBatch, load: StepLoad, now_s: float) -> None:
        for item in batch.sequences[load.num_decodes :]:
            _, progress = self._progress[self._scheduler.request_of(item.seq_id).request_id]
            progress.num_preemptions = item.epoch
            if progress.first_scheduled_s is None:
                progress.first_scheduled_s = now_s

    def _sample(self, batch: MicroBatch) -> tuple[int, ...]:
        token_ids = []
        for item in batch.sequences:
            if item.sampling is not None:
                request_id = self._scheduler.request_of(item.seq_id).request_id
                request, progress = self._progress[request_id]
                token_ids.append(output_token_id(request, progress.num_output_tokens))
        return tuple(token_ids)

    def _take(self, events: Iterable[TokenEvent], now_s: float) -> None:
        """Note what became of requests."""
        progress_of, on_token = self._progress, self._requests.on_token
        for event in events:
            _, progress = progress_of[event.request_id]
            if event.token_id is not None:
                on_token(progress, now_s)
            if event.finish_reason is not None:
                self._requests.on_end(progress, event.finish_reason)
                del progress_of[event.request_id]
        if not progress_of and self._idle_since_s is None:
            self._idle_since_s = now_s
