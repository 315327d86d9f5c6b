"""An output-length predictor that writes the service's log."""

from pathlib import Path

from gllm_ray.config import SchedulerConfig
from gllm_ray.engine.length_log import LoggedPredictor
from gllm_ray.scheduler_factory import make_length_predictor
from gllm_ray.scheduling.length_predictor import LengthPredictor


def build_length_predictor(config: SchedulerConfig) -> LengthPredictor:
    """The predictor that a configuration names, with its log.

    Raises:
        ConfigError: The classifier's file cannot be read, or is none.
    """
    predictor = make_length_predictor(config.length_predictor)
    if config.length_log is None:
        return predictor
    return LoggedPredictor(predictor, Path(config.length_log), config.length_log_max_bytes)
