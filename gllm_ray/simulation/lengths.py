"""Draws prompt and output lengths: from public datasets' statistics, or from a distribution.

Prompt and output of a request are drawn independently. In the traces at hand their rank
correlation is 0.05 (openchat_sharegpt4), 0.07 (Azure conversation) and -0.02 (Azure code).
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from random import Random

from gllm_ray.simulation.length_config import (
    Dataset,
    DatasetLengthConfig,
    FixedLengthConfig,
    LengthConfig,
    LengthsConfig,
    UniformLengthConfig,
)

LengthSampler = Callable[[Random], int]


class QuantileTable:
    """A distribution of lengths: log-linear between quantiles that are known.

    Args:
        points: Probabilities from 0 to 1, and for each the tokens that this share of the lengths
            does not exceed; both in ascending order.
    """

    def __init__(self, points: list[tuple[float, int]]) -> None:
        self._probabilities = [probability for probability, _ in points]
        self._logs = [math.log(tokens) for _, tokens in points]

    def quantile(self, probability: float) -> float:
        """Tokens that a share of the lengths does not exceed; the share is from 0 to 1."""
        right = min(bisect_right(self._probabilities, probability), len(self._logs) - 1)
        low, high = self._probabilities[right - 1], self._probabilities[right]
        weight = (probability - low) / (high - low)
        return math.exp(self._logs[right - 1] * (1 - weight) + self._logs[right] * weight)

    def mean(self) -> float:
        """The mean before rounding to whole tokens."""
        total = 0.0
        for (low, first), (high, last) in pairwise(
            zip(self._probabilities, self._logs, strict=True)
        ):
            slope = last - first
            height = (math.exp(last) - math.exp(first)) / slope if slope else math.exp(first)
            total += (high - low) * height
        return total

    def sample(self, rng: Random) -> int:
        """Draw a length."""
        return round(self.quantile(rng.random()))


def _at_grid(*tokens: int) -> list[tuple[float, int]]:
    grid = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
    return list(zip((*grid, 0.995, 0.999, 1), tokens, strict=True))


# fmt: off
DATASETS: dict[Dataset, tuple[QuantileTable, QuantileTable]] = {
    # ShareGPT as gLLM's benchmark filters it: prompts of 4 to 1024 tokens with a mean of 225.3,
    # answers of 4 to 512 with a mean of 157.0. No more is published, so these are quantiles of
    # the distribution of maximum entropy for these, a truncated exponential one.
    # Source: github.com/gty111/gLLM at 239ac66, benchmarks/benchmark_serving.py; Guo et al.,
    # "gLLM", SC '25.
    "sharegpt": (
        QuantileTable(_at_grid(
            4, 9, 16, 28, 56, 86, 122, 164, 215, 280, 370, 433, 519, 655, 807, 891, 948, 1007, 1024
        )),
        QuantileTable(_at_grid(
            4, 8, 13, 23, 43, 67, 93, 124, 160, 205, 265, 303, 351, 415, 467, 488, 500, 509, 512
        )),
    ),
    # openchat_sharegpt4 of at most 8,192 tokens, the chat set of Agrawal et al., "Sarathi-Serve",
    # OSDI '24. Quantiles of its 30,731 rows at github.com/microsoft/sarathi-serve, branch
    # niyama_asplos2026 (Apache-2.0).
    "sharegpt_8k": (
        QuantileTable(_at_grid(
            1, 16, 29, 74, 382, 777, 1203, 1730, 2401, 3235, 4278, 4918, 5696, 6563, 7164, 7434,
            7622, 7854, 8141,
        )),
        QuantileTable(_at_grid(
            2, 19, 44, 84, 181, 271, 346, 415, 493, 581, 683, 754, 834, 920, 975, 998, 1009, 1021,
            1024,
        )),
    ),
    # Azure LLM inference trace 2023, conversation: Patel et al., "Splitwise", ISCA '24, and
    # github.com/Azure/AzurePublicDataset (CC-BY-4.0). Quantiles of the 19,366 rows of the copy at
    # github.com/microsoft/vidur, 7d47513 (MIT).
    "azure_conversation": (
        QuantileTable(_at_grid(
            2, 91, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 1876, 2734, 4083, 4098, 4142,
            4831, 6179, 14050,
        )),
        QuantileTable(_at_grid(
            7, 24, 41, 54, 77, 91, 103, 129, 177, 384, 400, 411, 424, 451, 540, 601, 643, 954, 1000
        )),
    ),
    # The same, code: 8,819 rows.
    "azure_code": (
        QuantileTable(_at_grid(
            3, 35, 75, 147, 386, 770, 1075, 1469, 1909, 2433, 3192, 3920, 5188, 7303, 7436, 7436,
            7436, 7437, 7437,
        )),
        QuantileTable(_at_grid(
            6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 39, 55, 90, 171, 251, 359, 825, 1899
        )),
    ),
    # arXiv summarization of at most 16,384 tokens, the other set of "Sarathi-Serve". Published
    # are median, 90th percentile and standard deviation (3638 and 265); the other points are
    # chosen so that the deviations agree.
    "arxiv_summarization": (
        QuantileTable([(0, 2700), (0.5, 7059), (0.9, 12985), (1, 15900)]),
        QuantileTable([(0, 40), (0.5, 208), (0.9, 371), (0.99, 930), (1, 4056)]),
    ),
}
# fmt: on


class RequestLengths:
    """Draws the lengths of a workload's requests.

    Args:
        config: Whose lengths they are.
    """

    def __init__(self, config: LengthsConfig) -> None:
        self._prompt = _sampler(config.prompt, side=0)
        self._output = _sampler(config.output, side=1)
        self._max_total_tokens = config.max_total_tokens

    def sample(self, rng: Random) -> tuple[int, int]:
        """Draw the prompt and output tokens of a request, each at least 1."""
        prompt, output = self._prompt(rng), self._output(rng)
        total = prompt + output
        if self._max_total_tokens is not None and total > self._max_total_tokens:
            prompt = max(1, prompt * self._max_total_tokens // total)
            output = self._max_total_tokens - prompt
        return prompt, output


def _sampler(config: LengthConfig, *, side: int) -> LengthSampler:
    """What draws one length; `side` is 0 for the prompts of a dataset and 1 for its outputs."""
    if isinstance(config, DatasetLengthConfig):
        return DATASETS[config.dataset][side].sample
    if isinstance(config, FixedLengthConfig):
        tokens = config.tokens
        return lambda _: tokens
    if isinstance(config, UniformLengthConfig):
        low, high = config.min_tokens, config.max_tokens
        return lambda rng: rng.randint(low, high)
    mu, sigma, limit = math.log(config.median_tokens), config.sigma, config.max_tokens

    def sample_lognormal(rng: Random) -> int:
        while (tokens := max(1, round(rng.lognormvariate(mu, sigma)))) > limit:
            pass  # The median is within the limit, so half of the draws are.
        return tokens

    return sample_lognormal
