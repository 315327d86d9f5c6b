"""Least squares without a tensor library, and what the scheduler knows of a pipeline's cost."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, combinations, product
from math import fsum, sqrt

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost

_TILES = (1, 16, 32, 64, 128, 256)
_NUM_DECODES = (0, 1, 8, 32, 100, 256)
_CONTEXTS = (200, 1000, 4000)
_CHUNKS = (0, 50, 128, 250, 512, 900, 2048)
_CHUNK_STARTS = (0, 3000)
_MAX_ROWS = 2**19  # of a table that is still flat


def fit_scheduler_cost(cost: PipelineCost, provenance: str) -> CalibratedCostModel:
    """What a scheduler needs of a pipeline's cost: the slowest stage's time.

    The time of rows is taken over as it is, at the steps of any tile, and beyond 4,096 rows until
    it rises, as where the host is what takes long. What a context token and an attention pair cost
    minimises the relative error over loads of up to 256 decodes of up to 4,000
    tokens and a chunk of up to 2,048 tokens.

    Raises:
        ConfigError: More rows do not take longer: measurements are too few or too noisy.
    """
    stages = range(cost.layout.num_stages)

    def time_s(load: StepLoad) -> float:
        return max(cost.stage_time_s(stage, load) for stage in stages)

    row_times_s = {rows: time_s(StepLoad(num_prefill_tokens=rows)) for rows in _table_rows()}
    while max(row_times_s.values()) <= row_times_s[1]:
        more = 2 * max(row_times_s)
        if more > _MAX_ROWS:
            raise ConfigError(
                f"{provenance}: {max(row_times_s)} rows take no longer than one; must rise with "
                "the rows, or be learnt (cost_model: learnt)"
            )
        row_times_s[more] = time_s(StepLoad(num_prefill_tokens=more))
    calibration = {
        "rows": list(row_times_s),
        "row_times_s": list(accumulate(row_times_s.values(), max)),
        "context_token_s": 0.0,
        "attention_pair_s": 0.0,
        "tile": _best_tile(row_times_s),
        "provenance": provenance,
    }
    rows_alone = CalibratedCostModel.from_calibration(calibration)
    loads = _grid()
    times_s = [time_s(load) for load in loads]
    calibration["context_token_s"], calibration["attention_pair_s"] = least_squares(
        [(load.num_context_tokens, load.num_attention_pairs) for load in loads],
        [
            time - rows_alone.stage_time(load._replace(num_context_tokens=0, num_attention_pairs=0))
            for load, time in zip(loads, times_s, strict=True)
        ],
        times_s,
    )
    return CalibratedCostModel.from_calibration(calibration)


def _table_rows() -> list[int]:
    """Both sides of every step that a tile of at least 32 rows may make; beyond 512, 128 rows."""
    edges = [*range(32, 512, 32), *range(512, 2049, 128)]
    return [1, 8, *chain.from_iterable((edge, edge + 1) for edge in edges), 4096]


def _best_tile(row_times_s: Mapping[int, float]) -> int:
    """The tile whose multiples come nearest to the time of rows, as a line over them."""
    targets = list(row_times_s.values())

    def error(tile: int) -> float:
        samples = [(1, -(-rows // tile) * tile) for rows in row_times_s]
        weights = least_squares(samples, targets, targets)
        return fsum(
            (_dot(weights, sample) / target - 1) ** 2
            for sample, target in zip(samples, targets, strict=True)
        )

    return min(_TILES, key=error)


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
