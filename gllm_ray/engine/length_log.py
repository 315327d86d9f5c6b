"""A log of output lengths, from which a classifier of them is trained."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Literal, Self

from pydantic import Field, model_validator

from gllm_ray.messages import GenerationRequest
from gllm_ray.scheduling.length_classifier import (
    NUM_LAST_TOKENS,
    NUM_TOKEN_BUCKETS,
    LengthFeatures,
    features_of,
)
from gllm_ray.scheduling.length_predictor import LengthPredictor
from gllm_ray.strict_schema import StrictModel

logger = logging.getLogger(__name__)


class LengthRecord(StrictModel):
    """A line of the log: a request's features, and how it ended. See `LengthFeatures`."""

    num_prompt_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    is_sampled: bool
    token_buckets: Annotated[
        list[Annotated[int, Field(ge=0, lt=NUM_TOKEN_BUCKETS)]],
        Field(min_length=1, max_length=NUM_LAST_TOKENS),
    ]
    num_output_tokens: int = Field(ge=1)
    finish_reason: Literal["stop", "length"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_output_tokens > self.max_tokens:
            raise ValueError(
                f"num_output_tokens={self.num_output_tokens}: must be <= "
                f"max_tokens={self.max_tokens}"
            )
        return self

    @property
    def features(self) -> LengthFeatures:
        """What the classifier sees."""
        return LengthFeatures(
            self.num_prompt_tokens, self.max_tokens, self.is_sampled, tuple(self.token_buckets)
        )


class LoggedPredictor:
    """Another predictor, whose observations are appended to a file as `LengthRecord` lines.

    A stop at the very last token allowed is logged as `length`. When the file is full, or cannot
    be written, that is said once and the log ends; the service goes on.

    Args:
        inner: Predicts and learns.
        path: Created if it is missing; its directory is not.
        max_bytes: The file grows no larger; what is in it from before counts.
    """

    def __init__(self, inner: LengthPredictor, path: Path, max_bytes: int) -> None:
        self._inner = inner
        self._path = path
        self._max_bytes = max_bytes
        self._file: IO[bytes] | None = None
        try:
            # Unbuffered: a line is one write, so lines of several processes do not mix.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._end(str(error))

    def predict(self, request: GenerationRequest) -> int | None:
        """What the other predictor says."""
        return self._inner.predict(request)

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Let the other predictor learn, and write a line."""
        self._inner.observe(request, num_output_tokens)
        if self._file is None:
            return
        features = features_of(request)
        record = LengthRecord(
            num_prompt_tokens=features.num_prompt_tokens,
            max_tokens=features.max_tokens,
            is_sampled=features.is_sampled,
            token_buckets=list(features.token_buckets),
            num_output_tokens=num_output_tokens,
            finish_reason="stop" if num_output_tokens < request.max_tokens else "length",
        )
        line = record.model_dump_json().encode() + b"\n"
        try:
            if self._file.tell() + len(line) > self._max_bytes:
                self._end(f"it has reached {self._max_bytes} bytes")
            else:
                self._file.write(line)
        except OSError as error:
            self._end(str(error))

    def _end(self, reason: str) -> None:
        logger.warning("length log %s ends here: %s", self._path, reason)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
