"""Least squares without a tensor library, and the linear cost model of the scheduler from it."""

from collections.abc import Sequence
from itertools import chain, combinations, product
from math import fsum, inf, sqrt

from gllm_ray.scheduling.cost_model import priced_rows
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost

_TILES = (1, 16, 32, 64, 128, 256)
_MIN_ROWS = (1, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384)
_NUM_DECODES = (0, 1, 8, 32, 100, 256)
_CONTEXTS = (200, 1000, 4000)
_CHUNKS = (0, 50, 128, 250, 512, 900, 2048)
_CHUNK_STARTS = (0, 3000)


def linear_fit(cost: PipelineCost) -> dict[str, float]:
    """The coefficients of the scheduler's linear cost model that come nearest to a pipeline's cost.

    They minimise the relative error of the slowest stage's time over loads of up to 256 decodes of
    up to 4,000 tokens and a chunk of up to 2,048 tokens; `tile` and `min_rows` are the candidates
    that fit best.

    Returns:
        `floor_s`, `token_s`, `context_token_s`, `attention_pair_s`, `tile` and `min_rows`.
    """
    loads = _grid()
    stages = range(cost.layout.num_stages)
    times_s = [max(cost.stage_time_s(stage, load) for stage in stages) for load in loads]
    best: tuple[float, int, int, list[float]] = (inf, 1, 1, [])
    for tile, min_rows in product(_TILES, _MIN_ROWS):
        rows = [
            (
                1,
                priced_rows(load.num_tokens, tile, min_rows),
                load.num_context_tokens,
                load.num_attention_pairs,
            )
            for load in loads
        ]
        weights = least_squares(rows, times_s, times_s)
        errors = (
            _dot(weights, row) / time_s - 1 for row, time_s in zip(rows, times_s, strict=True)
        )
        best = min(best, (fsum(error * error for error in errors), tile, min_rows, weights))
    _, tile, min_rows, (floor_s, token_s, context_token_s, attention_pair_s) = best
    return {
        "floor_s": floor_s,
        "token_s": token_s,
        "context_token_s": context_token_s,
        "attention_pair_s": attention_pair_s,
        "tile": tile,
        "min_rows": min_rows,
    }


def least_squares(
    rows: Sequence[Sequence[float]], targets: Sequence[float], scales: Sequence[float]
) -> list[float]:
    """The weights, none of them negative, whose weighted sums come nearest to the targets.

    Every subset of the features is solved for, so there should be few.

    Args:
        rows: The features of each sample.
        targets: What their weighted sums should be.
        scales: A sample's error counts in units of this.
    """
    scaled = [[x / scale for x in row] for row, scale in zip(rows, scales, strict=True)]
    goal = [target / scale for target, scale in zip(targets, scales, strict=True)]
    columns = [list(column) for column in zip(*scaled, strict=True)]
    norms = [sqrt(_dot(column, column)) or 1.0 for column in columns]
    unit = [[x / norm for x in column] for column, norm in zip(columns, norms, strict=True)]
    gram = [[_dot(a, b) for b in unit] for a in unit]
    moment = [_dot(column, goal) for column in unit]
    best, best_gain = [0.0] * len(norms), 0.0
    indices = range(len(norms))
    for subset in chain.from_iterable(combinations(indices, n + 1) for n in indices):
        solution = _solve(
            [[gram[i][j] for j in subset] for i in subset], [moment[i] for i in subset]
        )
        if solution is None or min(solution) < 0:
            continue
        weights = [0.0] * len(norms)
        for weight, i in zip(solution, subset, strict=True):
            weights[i] = weight
        if (gain := _dot(weights, moment)) > best_gain:
            best, best_gain = weights, gain
    return [weight / norm for weight, norm in zip(best, norms, strict=True)]


def _grid() -> list[StepLoad]:
    loads = []
    for decodes, context, chunk, start in product(_NUM_DECODES, _CONTEXTS, _CHUNKS, _CHUNK_STARTS):
        if decodes + chunk:
            loads.append(StepLoad(decodes, decodes * context, chunk, chunk * (start + chunk)))
    return list(dict.fromkeys(loads))


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """The solution of a symmetric positive definite system; None if it is singular."""
    size = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(size):
        if rows[i][i] < 1e-12:
            return None
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = fsum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return fsum(x * y for x, y in zip(a, b, strict=True))
