"""A trained classifier of output lengths: its features, its file, and how it predicts."""

import json
from math import exp, fsum, log2
from operator import mul
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from gllm_ray.errors import ConfigError
from gllm_ray.messages import GenerationRequest
from gllm_ray.scheduling.length_predictor import own_hint
from gllm_ray.strict_schema import StrictModel, parse_strictly

NUM_LAST_TOKENS = 64
NUM_TOKEN_BUCKETS = 1024
NUM_SCALARS = 3

# Knuth's multiplicative hash: the high bits of the product with 2**32 over the golden ratio.
_MULTIPLIER = 2_654_435_769
_SHIFT = 32 - (NUM_TOKEN_BUCKETS - 1).bit_length()

# Bounded, so that no sum of them overflows.
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class LengthFeatures(NamedTuple):
    """What the classifier, and its training log, know of a request: not its prompt.

    Attributes:
        num_prompt_tokens: Length of the prompt.
        max_tokens: The request's limit.
        is_sampled: Its temperature is above 0.
        token_buckets: Hashes of the prompt's last tokens, each once and in rising order, so that
            neither the tokens nor their order can be read from it.
    """

    num_prompt_tokens: int
    max_tokens: int
    is_sampled: bool
    token_buckets: tuple[int, ...]

    @property
    def scalars(self) -> tuple[float, float, float]:
        """The features that are numbers."""
        return log2(self.num_prompt_tokens), log2(self.max_tokens), float(self.is_sampled)


def features_of(request: GenerationRequest) -> LengthFeatures:
    """The features of a request, the same on any machine."""
    last_tokens = request.prompt_token_ids[-NUM_LAST_TOKENS:]
    buckets = {(token * _MULTIPLIER & 0xFFFFFFFF) >> _SHIFT for token in last_tokens}
    return LengthFeatures(
        len(request.prompt_token_ids),
        request.max_tokens,
        request.sampling.temperature > 0,
        tuple(sorted(buckets)),
    )


class LengthClassifier(StrictModel):
    """Softmax regression over classes of output length; a `LengthPredictor`, and its file's schema.

    The classes are ranges of length, and one more for requests that reach `max_tokens`. The
    prediction is the expectation: each class's length, at most `max_tokens`, weighed by its
    likelihood. Where many predictions are summed, the errors of expectations cancel.

    Source: TD-Pipe's output-length classifier (arXiv:2506.10470), which follows mu-Serve (Qiu et
        al., ATC '24). Deviations: a linear model takes the place of a language model, because it
        runs inside the scheduler; the expectation that of the most likely class's mean; requests
        cut at `max_tokens` have a class of their own.

    Attributes:
        format: Changes with the meaning of what follows.
        class_lengths: Output tokens of each class: the mean of a range; last, for requests that
            reach `max_tokens`, the longest output ever seen, so that a small likelihood of a large
            `max_tokens` does not outweigh all others.
        bias: A score for each class.
        scalar_weights: For each of `LengthFeatures.scalars`, what a unit of it adds to the scores.
        token_weights: For each token bucket, what its presence adds to the scores.
    """

    format: Literal["gllm_ray.length_classifier.v1"]
    class_lengths: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=2)]
    bias: list[Weight]
    scalar_weights: list[list[Weight]]
    token_weights: list[list[Weight]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_classes = len(self.class_lengths)
        for key, rows, num_rows in (
            ("bias", [self.bias], 1),
            ("scalar_weights", self.scalar_weights, NUM_SCALARS),
            ("token_weights", self.token_weights, NUM_TOKEN_BUCKETS),
        ):
            if len(rows) != num_rows or any(len(row) != num_classes for row in rows):
                raise ValueError(
                    f"{key}: must be {num_rows} x {num_classes} numbers, as class_lengths has "
                    f"{num_classes}"
                )
        return self

    def predict(self, request: GenerationRequest) -> int:
        """The hint, or the expected output length."""
        return own_hint(request) or self.expected_output_tokens(features_of(request))

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Learns nothing: it is trained from a log, by `gllm-ray train-lengths`."""

    def expected_output_tokens(self, features: LengthFeatures) -> int:
        """The expected output length, from 1 to `max_tokens`."""
        lengths = [min(length, features.max_tokens) for length in self.class_lengths]
        likelihoods = self.likelihoods(features)
        expected = fsum(map(mul, likelihoods, lengths)) / fsum(likelihoods)
        return max(1, min(round(expected), features.max_tokens))

    def likelihoods(self, features: LengthFeatures) -> list[float]:
        """How likely each class is, in proportion to the likeliest."""
        scalars = zip(features.scalars, self.scalar_weights, strict=True)
        rows = [self.bias, *([value * weight for weight in row] for value, row in scalars)]
        rows += [self.token_weights[bucket] for bucket in features.token_buckets]
        # `sum` rounds otherwise in later versions of Python; `fsum` is exact.
        scores = [fsum(column) for column in zip(*rows, strict=True)]
        highest = max(scores)
        return [exp(score - highest) for score in scores]


def parse_classifier(text: str) -> LengthClassifier:
    """Read the file that `gllm-ray train-lengths` writes.

    Raises:
        ConfigError: The text is not such a file; one line for each mistake.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None
    return parse_strictly(LengthClassifier, data)
