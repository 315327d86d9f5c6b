"""A cost model from a configuration."""

import json
from pathlib import Path

from gllm_ray.config import SchedulerConfig
from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.cost_model import FixedCostModel, LearntCostModel
from gllm_ray.scheduling.load import CostModel


def build_cost_model(config: SchedulerConfig) -> CostModel:
    """The calibrated model that a configuration names, or one that learns while it serves.

    Raises:
        ConfigError: The calibration cannot be read.
    """
    if config.cost_calibration is None:
        return LearntCostModel()
    path = Path(config.cost_calibration)
    try:
        calibration = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: {error}") from error
    if not isinstance(calibration, dict):
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: must hold a JSON object")
    try:
        return FixedCostModel.from_calibration(calibration)
    except ConfigError as error:
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: {error}") from error
