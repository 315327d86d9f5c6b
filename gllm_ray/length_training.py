"""Training of the output-length classifier: from a service's length log to the classifier."""

import json
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import eq
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag

from gllm_ray.engine.length_log import LengthRecord
from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.length_classifier import (
    NUM_SCALARS,
    NUM_TOKEN_BUCKETS,
    LengthClassifier,
)
from gllm_ray.strict_schema import parse_strictly

MIN_STOPS = 200
_HELD_OUT_RATIO = 0.2
_TOP_CLASS_QUANTILE = 0.99
# Standard deviation of a weight before any request is seen, so that a short log is not learnt by
# heart; that of a scalar is of the scalar in units of its own deviation.
_TOKEN_PRIOR = 0.2
_SCALAR_PRIOR = 1.0
_MAX_ITERATIONS = 200
_SUM_SIZE = 256
_NUM_SUMS = 200
_MAX_MISTAKES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How well a classifier does on requests it was not trained on.

    Attributes:
        num_trained: Requests it was trained on.
        num_held_out: Requests it was not.
        accuracy: Share of these whose class it finds.
        frequent_accuracy: The same for always saying the most frequent class.
        sum_error: Mean relative error of the sum of its predictions over 256 of these, drawn with
            replacement.
        mean_sum_error: The same for always predicting the mean of those it was trained on.
    """

    num_trained: int
    num_held_out: int
    accuracy: float
    frequent_accuracy: float
    sum_error: float
    mean_sum_error: float

    def table(self) -> str:
        """The numbers for people, and what follows from them."""
        lines = [
            f"{self.num_trained} requests to train on, {self.num_held_out} held out",
            "",
            f"{'of those held out':38}classifier  baseline",
            _row("right class", self.accuracy, self.frequent_accuracy, "most frequent class"),
            _row(
                f"error of {_SUM_SIZE} lengths' sum",
                self.sum_error,
                self.mean_sum_error,
                "mean length",
            ),
        ]
        if self.sum_error >= self.mean_sum_error:
            lines += ["", "The mean does as well: keep `length_predictor: statistics`."]
        return "\n".join(lines)


def read_length_log(path: Path) -> list[LengthRecord]:
    """Read a log that `LoggedPredictor` wrote.

    Raises:
        ConfigError: It cannot be read, or lines of it are wrong; each is named with its number.
    """
    records, mistakes = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    records.append(_parse_line(line))
                except ConfigError as error:
                    mistakes.append(f"{path}:{number}: {error}; delete the line, or mend it")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name the file of `length_log`") from None
    if hidden := mistakes[_MAX_MISTAKES:]:
        mistakes[_MAX_MISTAKES:] = [f"{path}: {len(hidden)} more lines are wrong"]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return records


def train_classifier(
    records: Sequence[LengthRecord], *, num_classes: int = 5, seed: int = 0
) -> tuple[LengthClassifier, Evaluation]:
    """Train on four fifths of a log, and evaluate on the rest.

    Args:
        records: The log.
        num_classes: Ranges of output length, at least 3, cut at the 99th percentile and at equally
            spaced ones below: 25, 50 and 75 for five. Cuts at the same length are one.
        seed: Draws which requests are held out, and which of those are summed up.

    Raises:
        ConfigError: The log is too short.
    """
    num_stops = sum(record.finish_reason == "stop" for record in records)
    if num_stops < MIN_STOPS:
        raise ConfigError(
            f"{num_stops} of {len(records)} requests ended with `stop`; must be at least "
            f"{MIN_STOPS}: log more of them"
        )
    rng = random.Random(seed)
    shuffled = rng.sample(records, len(records))
    num_held_out = round(_HELD_OUT_RATIO * len(records))
    held_out, trained = shuffled[:num_held_out], shuffled[num_held_out:]
    bounds = _class_bounds(trained, num_classes)
    classifier = _fit(trained, bounds)
    return classifier, _evaluate(classifier, bounds, trained, held_out, rng)


def _row(name: str, classifier: float, baseline: float, always: str) -> str:
    return f"{name:38}{classifier:10.1%}{baseline:10.1%}  always the {always}"


def _parse_line(line: bytes) -> LengthRecord:
    try:
        data = json.loads(line)
    except ValueError:
        raise ConfigError("not a line of JSON; it may have been cut short") from None
    try:
        return parse_strictly(LengthRecord, data)
    except ConfigError as error:
        raise ConfigError("; ".join(str(error).splitlines())) from None


def _class_bounds(records: Sequence[LengthRecord], num_classes: int) -> list[int]:
    """The greatest length of each range but the last, over requests that ended with `stop`."""
    lengths = sorted(r.num_output_tokens for r in records if r.finish_reason == "stop")
    shares = [i / (num_classes - 1) for i in range(1, num_classes - 1)] + [_TOP_CLASS_QUANTILE]
    bounds = {lengths[int(share * (len(lengths) - 1))] for share in shares}
    return sorted(bounds - {lengths[-1]})


def _class_of(record: LengthRecord, bounds: list[int]) -> int:
    """A range of length, or after all of these, the class of requests that reach `max_tokens`."""
    if record.finish_reason == "length":
        return len(bounds) + 1
    return bisect_left(bounds, record.num_output_tokens)


def _class_lengths(records: Sequence[LengthRecord], bounds: list[int]) -> list[float]:
    lengths: list[list[int]] = [[] for _ in range(len(bounds) + 2)]
    for record in records:
        lengths[_class_of(record, bounds)].append(record.num_output_tokens)
    longest = max(record.num_output_tokens for record in records)
    return [*map(fmean, lengths[:-1]), float(longest)]


def _fit(records: Sequence[LengthRecord], bounds: list[int]) -> LengthClassifier:
    """The most probable weights: a convex problem, so neither its start nor a seed matters."""
    num_classes = len(bounds) + 2
    classes = torch.tensor([_class_of(record, bounds) for record in records])
    buckets = torch.tensor(list(chain.from_iterable(r.token_buckets for r in records)))
    offsets = torch.tensor([0, *accumulate(len(r.token_buckets) for r in records[:-1])])
    scalars = torch.tensor([record.features.scalars for record in records])
    center, scale = scalars.mean(dim=0), scalars.std(dim=0).clamp(min=1e-3)
    scalars = (scalars - center) / scale

    bias = torch.zeros(num_classes, requires_grad=True)
    scalar_weights = torch.zeros(NUM_SCALARS, num_classes, requires_grad=True)
    token_weights = torch.zeros(NUM_TOKEN_BUCKETS, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [bias, scalar_weights, token_weights],
        max_iter=_MAX_ITERATIONS,
        line_search_fn="strong_wolfe",
    )

    def negative_log_posterior() -> Tensor:
        optimizer.zero_grad()
        tokens = embedding_bag(buckets, token_weights, offsets, mode="sum")
        likelihood = cross_entropy(tokens + scalars @ scalar_weights + bias, classes)
        prior = (token_weights / _TOKEN_PRIOR).square().sum()
        prior = prior + (scalar_weights / _SCALAR_PRIOR).square().sum()
        loss = likelihood + prior / (2 * len(records))
        loss.backward()
        return loss

    optimizer.step(negative_log_posterior)
    with torch.no_grad():
        scalar_weights /= scale[:, None]
        bias -= center @ scalar_weights
    return LengthClassifier(
        format="gllm_ray.length_classifier.v1",
        class_lengths=_class_lengths(records, bounds),
        bias=bias.tolist(),
        scalar_weights=scalar_weights.tolist(),
        token_weights=token_weights.tolist(),
    )


def _evaluate(
    classifier: LengthClassifier,
    bounds: list[int],
    trained: Sequence[LengthRecord],
    held_out: Sequence[LengthRecord],
    rng: random.Random,
) -> Evaluation:
    classes = [_class_of(record, bounds) for record in held_out]
    frequent, _ = Counter(_class_of(record, bounds) for record in trained).most_common(1)[0]
    likelihoods = [classifier.likelihoods(record.features) for record in held_out]
    found = [row.index(max(row)) for row in likelihoods]
    mean = fmean(record.num_output_tokens for record in trained)
    lengths = [
        (classifier.expected_output_tokens(record.features), record.num_output_tokens)
        for record in held_out
    ]
    sum_errors, mean_sum_errors = [], []
    for _ in range(_NUM_SUMS):
        drawn = rng.choices(lengths, k=_SUM_SIZE)
        predicted, actual = map(sum, zip(*drawn, strict=True))
        sum_errors.append(abs(predicted - actual) / actual)
        mean_sum_errors.append(abs(_SUM_SIZE * mean - actual) / actual)
    return Evaluation(
        num_trained=len(trained),
        num_held_out=len(held_out),
        accuracy=fmean(map(eq, found, classes)),
        frequent_accuracy=classes.count(frequent) / len(classes),
        sum_error=fmean(sum_errors),
        mean_sum_error=fmean(mean_sum_errors),
    )
