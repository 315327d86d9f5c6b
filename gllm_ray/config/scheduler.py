"""The global scheduler."""

from pydantic import Field

from gllm_ray.config.byte_size import ByteSize
from gllm_ray.policy_config import BalancedConfig, PolicyConfig
from gllm_ray.predictor_config import LengthPredictorConfig, StatisticsPredictorConfig
from gllm_ray.strict_schema import StrictModel


class SchedulerConfig(StrictModel):
    """The global scheduler."""

    policy: PolicyConfig = Field(
        default=BalancedConfig(), description="How many tokens a micro-batch may hold."
    )
    max_decodes: int = Field(default=512, ge=1, description="Decodes in one micro-batch.")
    prefix_caching: bool = Field(
        default=True, description="Compute the common prefix of prompts once, and keep its KV."
    )
    max_waiting_requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests that may wait for KV blocks, every output counted; one more is "
        "refused with 429. null: no limit.",
    )
    max_waiting_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens that may wait to be computed; a request that adds more is "
        "refused with 429, unless nothing waits. null: no limit.",
    )
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds a request may wait for its first micro-batch, then it ends with 429; "
        "its own queue_timeout_s comes first. null: no limit.",
    )
    fair_share: bool = Field(
        default=False,
        description="Users, as requests name them, share prefill tokens evenly.",
    )
    cost_calibration: str | None = Field(
        default=None,
        min_length=1,
        description="File of a calibrated cost model; null: learnt from measured stage times.",
    )
    length_predictor: LengthPredictorConfig = Field(
        default=StatisticsPredictorConfig(), description="How long outputs are expected to be."
    )
    length_log: str | None = Field(
        default=None,
        min_length=1,
        description="A file on the node of the replica to which each request that ends adds a "
        "line, to train a classifier from; null: none.",
    )
    length_log_max_bytes: ByteSize = Field(
        default=16 * 2**20, description="Size at which `length_log` stops growing."
    )

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of a micro-batch."""
        return self.policy.max_batch_tokens(self.max_decodes)
