"""The values that cross a boundary: frozen, slotted, and free of tensors.

`MicroBatch` and its result are the whole protocol between the scheduler and the stages, real or
simulated; `GenerationRequest` and `TokenEvent` are the whole protocol between a client of the
engine and the engine.
"""

from gllm_ray.messages.micro_batches import (
    MicroBatch,
    MicroBatchResult,
    SampledTokens,
    ScheduledSequence,
    StageTime,
)
from gllm_ray.messages.reports import (
    EdgeAddress,
    EngineLoad,
    InboxAddress,
    StageInfo,
    StepInterval,
    StepUnderWay,
)
from gllm_ray.messages.requests import (
    FinishReason,
    GenerationRequest,
    LogitRules,
    OpenRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)

__all__ = [
    "EdgeAddress",
    "EngineLoad",
    "FinishReason",
    "GenerationRequest",
    "InboxAddress",
    "LogitRules",
    "MicroBatch",
    "MicroBatchResult",
    "OpenRequest",
    "SampledTokens",
    "SamplingParams",
    "ScheduledSequence",
    "StageInfo",
    "StageTime",
    "StepInterval",
    "StepUnderWay",
    "TokenEvent",
    "TokenLogprobs",
]
