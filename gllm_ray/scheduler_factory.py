"""What a scheduler is made of, from its configuration: for the engine and for the simulator."""

import json
from pathlib import Path
from typing import Protocol

from gllm_ray.config import SchedulerConfig, resolve_package_path
from gllm_ray.errors import ConfigError
from gllm_ray.predictor_config import (
    ClassifierPredictorConfig,
    HintPredictorConfig,
    LengthPredictorConfig,
    StatisticsPredictorConfig,
)
from gllm_ray.scheduling import QueueLimits, SchedulerSettings
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.length_classifier import LengthClassifier, parse_classifier
from gllm_ray.scheduling.length_predictor import HintPredictor, LengthPredictor, StatisticsPredictor
from gllm_ray.scheduling.load import CostModel


class PipelineOptions(Protocol):
    """What the configuration of a pipeline, served or simulated, tells the scheduler."""

    @property
    def num_stages(self) -> int:
        """Depth of the pipeline."""

    @property
    def max_in_flight(self) -> int | None:
        """Micro-batches in flight; None: as the policy wants."""

    @property
    def crowding(self) -> float:
        """How many times longer a stage computes while all others do, too."""

    @property
    def ring(self) -> bool:
        """Whether one more micro-batch may continue the oldest of them."""


def make_settings(
    config: SchedulerConfig,
    pipeline: PipelineOptions,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
) -> SchedulerSettings:
    """What a configuration and a pipeline tell the scheduler; see `SchedulerSettings`.

    Args:
        config: The limits of the scheduler.
        pipeline: What it fills.
        num_blocks: KV blocks that every stage has.
        block_size: Tokens a block holds.
        max_model_len: Prompt and output tokens a sequence may have.
    """
    return SchedulerSettings(
        num_stages=pipeline.num_stages,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_in_flight=pipeline.max_in_flight,
        crowding=pipeline.crowding,
        ring=pipeline.ring,
        max_decodes=config.max_decodes,
        prefix_caching=config.prefix_caching,
        fair_share=config.fair_share,
        queue=QueueLimits(
            max_requests=config.max_waiting_requests,
            max_tokens=config.max_waiting_tokens,
            timeout_s=config.queue_timeout_s,
        ),
    )


def make_cost_model(config: SchedulerConfig) -> CostModel:
    """The calibrated model that a configuration names, or one that learns while it serves.

    Raises:
        ConfigError: The calibration cannot be read.
    """
    if config.cost_calibration is None:
        return LearntCostModel()
    path = Path(resolve_package_path(config.cost_calibration))
    try:
        calibration = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: {error}") from error
    if not isinstance(calibration, dict):
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: must hold a JSON object")
    try:
        return CalibratedCostModel.from_calibration(calibration)
    except ConfigError as error:
        raise ConfigError(f"scheduler.cost_calibration={str(path)!r}: {error}") from error


def make_length_predictor(config: LengthPredictorConfig) -> LengthPredictor:
    """The predictor that a configuration names.

    Raises:
        ConfigError: The classifier's file cannot be read, or is none.
    """
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
