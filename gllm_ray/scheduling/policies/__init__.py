"""Policies: each turns a view of the load into the budget of the next micro-batch."""

from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PolicyConfig,
    PrefillFirstConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling.load import LoadView
from gllm_ray.scheduling.policies.balanced import BalancedPolicy
from gllm_ray.scheduling.policies.base import Policy, TokenBudget
from gllm_ray.scheduling.policies.chunked_prefill import ChunkedPrefillPolicy
from gllm_ray.scheduling.policies.prefill_first import PrefillFirstPolicy
from gllm_ray.scheduling.policies.temporal import TemporalPolicy
from gllm_ray.scheduling.policies.token_throttling import TokenThrottlingPolicy

__all__ = ["LoadView", "Policy", "TokenBudget", "make_policy"]


def make_policy(config: PolicyConfig) -> Policy:
    """Build the policy that a configuration names."""
    match config:
        case TokenThrottlingConfig():
            return TokenThrottlingPolicy(config)
        case ChunkedPrefillConfig():
            return ChunkedPrefillPolicy(config)
        case PrefillFirstConfig():
            return PrefillFirstPolicy(config)
        case TemporalConfig():
            return TemporalPolicy(config)
        case BalancedConfig():
            return BalancedPolicy(config)
