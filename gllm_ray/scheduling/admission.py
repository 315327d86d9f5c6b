"""Which requests may come in, and when one that may not should come again."""

from gllm_ray.errors import InvalidRequestError, OverloadedError
from gllm_ray.messages import GenerationRequest
from gllm_ray.scheduling.pool import SequencePool
from gllm_ray.scheduling.settings import SchedulerSettings

_RATE_WINDOW_S = 10.0
# Where fewer of the KV blocks are free, prompts may wait for those, and policies hold them back.
_MIN_FREE_KV_RATIO = 0.5
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 600.0


class BacklogRate:
    """The rate of prefill in the last 10 s of backlog.

    Attributes:
        tokens_per_s: The rate; 0: there has been no backlog.
    """

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self._num_tokens = 0  # scheduled since `_since_s`
        self._since_s: float | None = None
        self._seen_s = 0.0  # of backlog, up to the window

    def note(self, num_tokens: int, now_s: float, *, is_backlogged: bool) -> None:
        """Learn from a micro-batch.

        Args:
            num_tokens: Its prefill tokens.
            now_s: When it was formed.
            is_backlogged: Whether requests go on waiting.
        """
        if self._since_s is not None and now_s > self._since_s:
            elapsed_s = now_s - self._since_s
            # The mean of all that was seen, until that is more than the window.
            self._seen_s = min(self._seen_s + elapsed_s, _RATE_WINDOW_S)
            weight = min(1.0, elapsed_s / self._seen_s)
            self.tokens_per_s += weight * (self._num_tokens / elapsed_s - self.tokens_per_s)
            self._since_s, self._num_tokens = now_s, 0
        self._num_tokens += num_tokens
        if not is_backlogged:
            self.pause()
        elif self._since_s is None:
            self._since_s = now_s

    def pause(self) -> None:
        """What follows, up to the next micro-batch, is no time of backlog."""
        self._since_s, self._num_tokens = None, 0


class AdmissionControl:
    """Refuses what can never be served, and what would wait behind too much.

    Args:
        settings: The limits.
        pool: What waits, and what it may hold.

    Attributes:
        num_prompt_tokens: Prompt tokens of all requests that it let in.
        drain: How fast waiting prompts have been worked off.
        prefill: The same of those that waited for nothing but their prefill.
    """

    def __init__(self, settings: SchedulerSettings, pool: SequencePool) -> None:
        # The last output token is returned, never computed, so it needs no place in the KV cache.
        num_slots = settings.num_blocks * settings.block_size
        self._max_tokens = min(settings.max_model_len, num_slots + 1)
        self._queue = settings.queue
        self._pool = pool
        self.num_prompt_tokens = 0
        self.drain, self.prefill = BacklogRate(), BacklogRate()

    def check(self, request: GenerationRequest) -> None:
        """Let a request join those that wait.

        Raises:
            InvalidRequestError: It can never be served.
            OverloadedError: Too much waits already.
        """
        self.check_size(request)
        waiting = self._pool.waiting
        num_prompt_tokens = len(request.prompt_token_ids)
        if self._queue.max_requests is not None and len(waiting) >= self._queue.max_requests:
            self._refuse(f"{len(waiting)} requests wait", self._queue.max_requests)
        if (
            self._queue.max_tokens is not None
            and waiting
            and waiting.num_tokens + num_prompt_tokens > self._queue.max_tokens
        ):
            given = f"{waiting.num_tokens} tokens wait, and the prompt has {num_prompt_tokens}"
            self._refuse(given, self._queue.max_tokens)
        self.num_prompt_tokens += num_prompt_tokens

    def check_size(self, request: GenerationRequest) -> None:
        """Find out whether a request has a place here, however long it waits.

        Raises:
            InvalidRequestError: It can never be served.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if request.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if num_prompt_tokens + request.max_tokens > self._max_tokens:
            raise InvalidRequestError(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({request.max_tokens}) come "
                f"to {num_prompt_tokens + request.max_tokens} tokens; "
                f"the limit is {self._max_tokens}",
                code="context_length_exceeded",
            )

    def drain_time_s(self) -> float:
        """Seconds until the tokens that wait will have been scheduled, at the recent rate."""
        rate = self.drain.tokens_per_s
        num_tokens = self._pool.waiting.num_tokens * self._pool.prefix_cache.computed_ratio
        estimate = num_tokens / rate if rate else 0.0
        return min(max(estimate, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

    def note_scheduled(self, num_tokens: int, now_s: float) -> None:
        """Learn how fast waiting prompts are worked off.

        Args:
            num_tokens: Prefill tokens of a micro-batch.
            now_s: When it was formed.
        """
        is_backlogged = bool(self._pool.waiting)
        has_room = 1 - self._pool.allocator.utilization >= _MIN_FREE_KV_RATIO
        self.drain.note(num_tokens, now_s, is_backlogged=is_backlogged)
        self.prefill.note(num_tokens, now_s, is_backlogged=is_backlogged and has_room)

    def note_break(self) -> None:
        """Nothing is worked off until the pipeline is repaired."""
        self.drain.pause()
        self.prefill.pause()

    def _refuse(self, given: str, limit: int) -> None:
        retry_after_s = self.drain_time_s()
        raise OverloadedError(
            f"the service is full: {given}; the limit is {limit}; "
            f"send the request again in {retry_after_s:.0f} s",
            retry_after_s,
        )
