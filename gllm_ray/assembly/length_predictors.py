"""An output-length predictor from a configuration; the only place that reads a classifier."""

from pathlib import Path

from gllm_ray.config import SchedulerConfig, resolve_package_path
from gllm_ray.engine.length_log import LoggedPredictor
from gllm_ray.errors import ConfigError
from gllm_ray.predictor_config import (
    ClassifierPredictorConfig,
    HintPredictorConfig,
    LengthPredictorConfig,
    StatisticsPredictorConfig,
)
from gllm_ray.scheduling.length_classifier import LengthClassifier, parse_classifier
from gllm_ray.scheduling.length_predictor import HintPredictor, LengthPredictor, StatisticsPredictor


def build_length_predictor(config: SchedulerConfig) -> LengthPredictor:
    """The predictor that a configuration names, with its log.

    Raises:
        ConfigError: The classifier's file cannot be read, or is none.
    """
    predictor = _build(config.length_predictor)
    if config.length_log is None:
        return predictor
    return LoggedPredictor(predictor, Path(config.length_log), config.length_log_max_bytes)


def _build(config: LengthPredictorConfig) -> LengthPredictor:
    match config:
        case StatisticsPredictorConfig():
            return StatisticsPredictor()
        case HintPredictorConfig():
            return HintPredictor()
        case ClassifierPredictorConfig():
            return _read_classifier(config.path)


def _read_classifier(path: str) -> LengthClassifier:
    try:
        return parse_classifier(Path(resolve_package_path(path)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(
            f"scheduler.length_predictor.path={path!r}: must be a file that `gllm-ray "
            f"train-lengths` wrote, on the node of the replica: {error}"
        ) from None
