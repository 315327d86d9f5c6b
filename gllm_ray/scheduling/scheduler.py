"""The global scheduler: which sequences ride in the next micro-batch, and what came of it.

Nothing in flight is ever preempted, freed or aborted, so a stage never writes to a block that has
a new owner.

With the ring, the oldest micro-batch in flight counts as committed while the pipeline is full: the
next one is formed as if its tokens were here, and refers to them. The last stage has them for the
first one sooner than for the scheduler, which learns at the commit what they are. A sequence that
then turns out to have ended has decoded once in vain.
"""

from collections.abc import Set as AbstractSet

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import (
    EngineLoad,
    FinishReason,
    GenerationRequest,
    MicroBatch,
    MicroBatchResult,
    OpenRequest,
    TokenEvent,
    TokenLogprobs,
)
from gllm_ray.scheduling.admission import AdmissionControl
from gllm_ray.scheduling.flights import Flights
from gllm_ray.scheduling.length_predictor import LengthPredictor
from gllm_ray.scheduling.load import CostModel, LoadView, StepLoad
from gllm_ray.scheduling.load_view import take_view
from gllm_ray.scheduling.policies.base import Policy, TokenBudget
from gllm_ray.scheduling.pool import SequencePool
from gllm_ray.scheduling.sequence import Sequence, SequenceState
from gllm_ray.scheduling.settings import SchedulerSettings
from gllm_ray.scheduling.stage_times import StageTimes
from gllm_ray.scheduling.step import Requeued, Step

# Prefill tokens that run where a policy's budget would leave an idle pipeline idle.
_STALL_TOKENS = 256


class Scheduler:
    """Holds every sequence of one pipeline and decides what each micro-batch computes.

    A driver calls `add`, `abort` and `expire` at any time, `schedule` until it returns None, and
    `commit` for each result in submit order. The same calls give the same decisions on any
    machine. Times are those of the driver's clock, whatever its origin; for a driver that gives
    none it stands still.

    Args:
        policy: Sets the budget of each micro-batch.
        settings: What there is to fill.
        cost: Predicts stage times, and learns them.
        predictor: Predicts output lengths, and learns them.
    """

    def __init__(
        self,
        policy: Policy,
        settings: SchedulerSettings,
        *,
        cost: CostModel,
        predictor: LengthPredictor,
    ) -> None:
        self._policy = policy
        self._settings = settings
        self._cost = cost
        self._predictor = predictor
        self._pool = SequencePool(settings, overtaking=policy.overtaking)
        self._admission = AdmissionControl(settings, self._pool)
        self._flights = Flights(settings, policy.num_ahead)
        self._stage_times = StageTimes(cost, settings.num_stages, self._flights.max_in_flight)
        self._seq_ids: dict[str, int] = {}

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._seq_ids)

    @property
    def num_waiting_requests(self) -> int:
        """Those of them that hold no block."""
        return len(self._pool.waiting)

    @property
    def is_idle(self) -> bool:
        """No request is alive, and none that has ended is in flight."""
        return not self._pool

    @property
    def num_in_flight(self) -> int:
        """Micro-batches submitted and not yet committed."""
        return len(self._flights)

    @property
    def latest_load(self) -> StepLoad:
        """What the latest micro-batch in flight makes each stage compute."""
        return self._flights.latest_load

    @property
    def kv_utilization(self) -> float:
        """Share of the KV blocks in use, 0 to 1; blocks that are only cached are not."""
        return self._pool.allocator.utilization

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` may next end a request."""
        return self._pool.waiting.next_deadline_s

    def load(self) -> EngineLoad:
        """How much it holds now."""
        return EngineLoad(
            num_requests=self.num_requests,
            num_waiting_requests=self.num_waiting_requests,
            num_waiting_tokens=self._pool.num_waiting_tokens,
            num_in_flight=self.num_in_flight,
            kv_utilization=self.kv_utilization,
            num_preemptions=self._pool.num_preemptions,
            num_prefix_queried_tokens=self._pool.prefix_cache.num_queried_tokens,
            num_prefix_hit_tokens=self._pool.prefix_cache.num_hit_tokens,
            num_prompt_tokens=self._admission.num_prompt_tokens,
            drain_tokens_per_s=self._admission.drain.tokens_per_s,
            prefill_capacity_tokens_per_s=self._admission.prefill.tokens_per_s,
        )

    def request_of(self, seq_id: int) -> GenerationRequest:
        """The request of a sequence that is alive."""
        return self._pool[seq_id].request

    def add(self, request: GenerationRequest, now_s: float = 0.0) -> None:
        """Accept a request; from here on it ends with exactly one terminal event.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: Too much waits already.
        """
        self._refuse_used_id(request.request_id)
        self._admission.check(request)
        timeout_s = request.queue_timeout_s
        if timeout_s is None:
            timeout_s = self._settings.queue.timeout_s
        self._pool.add(
            self._new_sequence(request), None if timeout_s is None else now_s + timeout_s
        )

    def restore(self, open_request: OpenRequest) -> None:
        """Go on with a request that another scheduler had accepted: as if it were preempted here.

        It neither waits behind a limit nor does it expire.

        Raises:
            InvalidRequestError: The other one had more room, and here it can never be served.
        """
        self._refuse_used_id(open_request.request.request_id)
        self._admission.check_size(open_request.request)
        sequence = self._new_sequence(open_request.request)
        sequence.token_ids += open_request.output_token_ids
        if open_request.output_token_ids:
            sequence.prompt_logprobs = None  # they came with the first of these
        self._pool.add(sequence, None)

    def abort(self, request_id: str, num_output_tokens: int | None = None) -> list[TokenEvent]:
        """End a request early; one that is in flight ends at its commit.

        Args:
            request_id: Which one. Unknown ids are ignored.
            num_output_tokens: Its output is complete with so many tokens, of which the predictor
                learns; None: it is not.

        Returns:
            The terminal event, if the request ends now.
        """
        seq_id = self._seq_ids.get(request_id)
        if seq_id is None:
            return []
        sequence = self._pool[seq_id]
        if num_output_tokens is not None and not sequence.is_aborted:
            self._predictor.observe(sequence.request, num_output_tokens)
        self._pool.dequeue(sequence)
        if sequence.num_in_flight:
            sequence.is_aborted = True
            return []
        return [self._finish(sequence, FinishReason.ABORT)]

    def expire(self, now_s: float) -> list[TokenEvent]:
        """End the requests that waited for their first micro-batch until their deadline."""
        events = []
        expired = list(self._pool.waiting.take_expired(now_s))
        retry_after_s = self._admission.drain_time_s()
        message = (
            "the request waited longer than it may, because the service is full; "
            f"send it again in {retry_after_s:.0f} s"
        )
        for sequence in expired:
            event = self._finish(sequence, FinishReason.EXPIRED, error=message)
            events.append(event._replace(retry_after_s=retry_after_s))
        return events

    def schedule(self, now_s: float = 0.0) -> MicroBatch | None:
        """Form the next micro-batch, or return None if there is nothing to submit now.

        Decodes go first, the one that waits longest before the others; then prompts under way;
        then waiting ones.
        """
        oldest = self._flights.anticipate()
        if oldest is not None:
            self._pool.anticipate(oldest.sampling, now_s)
        if self._flights.is_full or not self._pool.has_work:
            return None
        step = self._select(self._policy.budget(self._view(now_s)))
        if not (step.items or self._flights):
            step = self._end_stall()
        return self._launch(step, now_s) if step.items else None

    def commit(self, result: MicroBatchResult, now_s: float = 0.0) -> list[TokenEvent]:
        """Apply the result of the oldest micro-batch in flight.

        Returns:
            One event for each sequence that got a token or ended.

        Raises:
            PipelineError: The result is not the one that is due.
        """
        step, is_anticipated = self._flights.land(result)
        self._stage_times.add(result.stage_times)
        ready = self._pool.ready
        step.note_prompt_logprobs(result.prompt_logprobs)
        events = self._fail_sampled(step, result)
        for sequence in step.others:
            sequence.num_in_flight -= 1
            if sequence.is_aborted:
                events += self._drop(sequence)
        num_tokens = 0
        all_logprobs = result.logprobs or (None,) * len(step.sampling)
        sampled = zip(step.sampling, result.token_ids, all_logprobs, strict=True)
        for sequence, token_id, logprobs in sampled:
            sequence.num_in_flight -= 1
            if sequence.is_aborted or sequence.has_ended:
                events += self._drop(sequence)
                continue
            if is_anticipated:
                self._pool.confirm(sequence, token_id)
            else:
                num_tokens += 1
                sequence.token_ids.append(token_id)
            sequence.token_s = now_s
            if token_id in sequence.stop_token_ids and sequence.may_end:
                events.append(self._finish(sequence, FinishReason.STOP, token_id, logprobs))
            elif len(sequence.token_ids) == sequence.max_num_tokens:
                events.append(self._finish(sequence, FinishReason.LENGTH, token_id, logprobs))
            else:
                if not is_anticipated:
                    ready[sequence.seq_id] = sequence
                fields = (sequence.request_id, token_id, None, None, None, logprobs, None, None)
                events.append(tuple.__new__(TokenEvent, fields))
        self._pool.count_output(num_tokens)
        step.tell_prompts(events)
        return events

    def fail_all(self, message: str) -> list[TokenEvent]:
        """End every request with an error, because the pipeline is gone.

        Returns:
            One terminal event for each request that was alive.
        """
        self._flights.clear()
        events = []
        for sequence in list(self._pool):
            sequence.num_in_flight = 0
            self._pool.dequeue(sequence)
            if sequence.has_ended:
                self._pool.forget(sequence)
            else:
                events.append(self._finish(sequence, FinishReason.ERROR, error=message))
        self._pool.allocator.forget_contents()
        return events

    def requeue_all(self) -> Requeued:
        """Begin again with every sequence, because the stages lost their KV and what was in flight.

        Each is prefilled once more, its output included; its place in the queue is the old one.
        """
        lost = [s for flight in self._flights for s in (*flight.step.sampling, *flight.step.others)]
        self._flights.clear()
        self._admission.note_break()
        events = []
        for sequence in list(self._pool):
            sequence.num_in_flight = 0
            if sequence.has_ended:
                self._pool.forget(sequence)
            elif sequence.is_aborted:
                events.append(self._finish(sequence, FinishReason.ABORT))
            elif sequence.state is not SequenceState.WAITING:
                self._pool.requeue(sequence)
        self._pool.allocator.forget_contents()
        alive = (s for s in lost if not (s.is_aborted or s.has_ended))
        return Requeued(events, {s.request_id: s.num_output_tokens for s in alive})

    def fail(self, request_id: str, message: str) -> list[TokenEvent]:
        """End a request that is to blame for a fault; unknown ids are ignored.

        Args:
            request_id: A request that is not in flight.
            message: For its client.
        """
        if request_id not in self._seq_ids:
            return []
        sequence = self._pool[self._seq_ids[request_id]]
        self._pool.dequeue(sequence)
        return [self._finish(sequence, FinishReason.BLAMED, error=message)]

    def hold_back(self, request_ids: AbstractSet[str]) -> None:
        """Let these wait while they hold no block, and none but these."""
        self._pool.waiting.hold_back(self._known_seq_ids(request_ids))

    def admit_only(self, request_ids: AbstractSet[str]) -> None:
        """Let all others wait that hold no block, those too that come later."""
        self._pool.waiting.admit_only(self._known_seq_ids(request_ids))

    def _known_seq_ids(self, request_ids: AbstractSet[str]) -> set[int]:
        return {self._seq_ids[name] for name in self._seq_ids.keys() & request_ids}

    def _view(self, now_s: float) -> LoadView:
        return take_view(self._pool, self._flights, self._settings, self._cost, now_s)

    def _select(self, budget: TokenBudget) -> Step:
        """Put as much in flight as the budget lets: decodes, then prefill chunks."""
        budget.decodes = min(budget.decodes, self._settings.max_decodes)
        step = Step()
        self._pool.waiting.put_first(budget.long_output)
        self._pool.schedule_decodes(step, budget, may_wait=bool(self._flights))
        taken = step.num_decodes if budget.is_shared else 0
        self._pool.schedule_prefills(
            step, max(0, budget.prefill_tokens - taken), budget.reserved_blocks
        )
        return step

    def _end_stall(self) -> Step:
        """A little work for an idle pipeline to which the policy's budget gives none."""
        step = self._select(TokenBudget(prefill_tokens=0, decodes=1))
        if not step.items:
            num_tokens = min(_STALL_TOKENS, self._policy.max_prefill_tokens)
            step = self._select(TokenBudget(prefill_tokens=num_tokens, decodes=0))
        return step

    def _launch(self, step: Step, now_s: float) -> MicroBatch:
        """Put in flight what was selected."""
        batch, _, load = self._flights.add(step, self._pool.take_copies(), self._pool.take_ended())
        if not step.scored_chunks:  # those take longer than any load tells
            self._stage_times.expect(batch.batch_id, load)
        self._admission.note_scheduled(load.num_prefill_tokens, now_s)
        return batch

    def _fail_sampled(self, step: Step, result: MicroBatchResult) -> list[TokenEvent]:
        """End the requests that no token may follow."""
        failed = [(step.sampling[index], why) for index, why in result.failures]
        return [
            self._finish(sequence, FinishReason.BLAMED, error=why)
            for sequence, why in failed
            if not sequence.is_aborted and not sequence.has_ended
        ]

    def _drop(self, sequence: Sequence) -> list[TokenEvent]:
        """Forget a sequence that takes no more tokens, unless a later micro-batch holds it."""
        if sequence.num_in_flight:
            return []
        if not sequence.has_ended:
            return [self._finish(sequence, FinishReason.ABORT)]
        self._pool.forget(sequence)
        return []

    def _refuse_used_id(self, request_id: str) -> None:
        if request_id in self._seq_ids:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another")

    def _new_sequence(self, request: GenerationRequest) -> Sequence:
        sequence = Sequence(self._pool.num_arrivals, request)
        sequence.predicted_output_tokens = self._predictor.predict(request)
        self._seq_ids[request.request_id] = sequence.seq_id
        return sequence

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_id: int | None = None,
        logprobs: TokenLogprobs | None = None,
        *,
        error: str | None = None,
    ) -> TokenEvent:
        """End a request, and forget its sequence unless a micro-batch holds it."""
        if sequence.num_in_flight:
            sequence.has_ended = True
            self._pool.retire(sequence)
        else:
            self._pool.forget(sequence)
        request = sequence.request
        del self._seq_ids[request.request_id]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._predictor.observe(request, sequence.num_output_tokens)
        return TokenEvent(request.request_id, token_id, reason, error, logprobs=logprobs)
