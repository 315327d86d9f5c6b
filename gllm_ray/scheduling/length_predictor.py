"""How long an output will be: the seam, and the two predictors that need no file."""

from typing import Protocol

from gllm_ray.messages import GenerationRequest

# The first requests to end are the short ones, so the first few say little of the rest.
_MIN_OBSERVATIONS = 32
# The mean of more than this many is a moving one, which forgets workloads that are gone.
_WINDOW = 512
# All lengths from 2**19 on share a bucket, which bounds the number of buckets.
_MAX_BIT_LENGTH = 20


class LengthPredictor(Protocol):
    """Predicts output lengths; a pure function of the requests it was asked about and shown."""

    def predict(self, request: GenerationRequest) -> int | None:
        """Output tokens the request will have in all, or None if there is nothing to go by.

        A request's own hint wins over what a predictor knows. From 1 to `max_tokens`.
        """

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Learn from a request that ended by itself: with `stop`, `length` or a stop string."""


def own_hint(request: GenerationRequest) -> int | None:
    """What the client expects, at most `max_tokens`; None if it says nothing or less than 1."""
    hint = request.expected_output_tokens
    return None if hint is None or hint < 1 else min(hint, request.max_tokens)


class HintPredictor:
    """Knows nothing but each request's own hint."""

    def predict(self, request: GenerationRequest) -> int | None:
        """The hint, where there is one."""
        return own_hint(request)

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Learns nothing: a hint speaks of one request."""


class StatisticsPredictor:
    """Predicts the mean output length of similar requests that have ended.

    Similar are those whose prompt length and `max_tokens` lie in the same powers of two; while
    fewer than 32 of them have ended, those whose prompt length does; then all. The mean is what a
    sum over many requests needs, such as the KV cache they will fill.

    A request that ends with `length` would have gone on. Among requests of about the same
    `max_tokens` that is no loss, because it is the length so cut that takes room. Wherever
    `max_tokens` differs, the mean is that of a constant chance to stop at each token, all tokens
    over the number of stops, so that requests of a small `max_tokens` do not make others short.
    """

    def __init__(self) -> None:
        self._similar: dict[tuple[int, int], _RunningMeans] = {}
        self._same_prompt_length: dict[int, _RunningMeans] = {}
        self._all = _RunningMeans()

    def predict(self, request: GenerationRequest) -> int | None:
        """The hint, or the mean of the narrowest bucket that has seen enough; O(1)."""
        if (hint := own_hint(request)) is not None:
            return hint
        mean = self._mean(*_bucket(request))
        return None if mean is None else max(1, round(min(mean, request.max_tokens)))

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Count the request in each bucket it belongs to; O(1)."""
        prompt, limit = _bucket(request)
        is_stop = num_output_tokens < request.max_tokens
        for means in (
            self._similar.setdefault((prompt, limit), _RunningMeans()),
            self._same_prompt_length.setdefault(prompt, _RunningMeans()),
            self._all,
        ):
            means.add(num_output_tokens, is_stop)

    def _mean(self, prompt: int, limit: int) -> float | None:
        similar = self._similar.get((prompt, limit))
        if similar is not None and similar.count >= _MIN_OBSERVATIONS:
            return similar.num_tokens
        for wider in (self._same_prompt_length.get(prompt), self._all):
            if wider is not None and wider.count >= _MIN_OBSERVATIONS:
                return wider.num_tokens / wider.stop_ratio if wider.stop_ratio else None
        return None


class _RunningMeans:
    """Means over the requests of a bucket, of which late ones weigh more than those long past.

    Attributes:
        count: Requests seen, at most the window.
        num_tokens: Mean output length.
        stop_ratio: Share of the requests that ended before `max_tokens`.
    """

    __slots__ = ("count", "num_tokens", "stop_ratio")

    def __init__(self) -> None:
        self.count = 0
        self.num_tokens = 0.0
        self.stop_ratio = 0.0

    def add(self, num_tokens: int, is_stop: bool) -> None:
        self.count = min(self.count + 1, _WINDOW)
        self.num_tokens += (num_tokens - self.num_tokens) / self.count
        self.stop_ratio += (is_stop - self.stop_ratio) / self.count


def _bucket(request: GenerationRequest) -> tuple[int, int]:
    return (
        min(len(request.prompt_token_ids).bit_length(), _MAX_BIT_LENGTH),
        min(request.max_tokens.bit_length(), _MAX_BIT_LENGTH),
    )
