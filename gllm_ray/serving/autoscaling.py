"""The autoscaler inside Ray Serve's controller."""

from dataclasses import fields
from typing import Any

from ray.serve.config import AutoscalingContext

from gllm_ray.autoscaling import Autoscaler, DeploymentLoad, ReplicaSignals
from gllm_ray.autoscaling_config import ScalingRule

_LOOK_BACK_INTERVALS = 2


def autoscaling_options(rule: ScalingRule) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config` for a rule.

    The rule has the delays; those of Serve itself are 0.
    """
    return {
        "min_replicas": rule.min_replicas,
        "max_replicas": rule.max_replicas,
        "target_ongoing_requests": rule.target_ongoing_requests,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        # Deprecated for variables of the whole cluster, which an application cannot set.
        "metrics_interval_s": rule.interval_s,
        "look_back_period_s": _LOOK_BACK_INTERVALS * rule.interval_s,
        "policy": {
            "policy_function": f"{SignalPolicy.__module__}:{SignalPolicy.__name__}",
            "policy_kwargs": rule.model_dump(),
        },
    }


class SignalPolicy:
    """A policy of Ray Serve, which makes one for each deployment and asks it ten times a second.

    Args:
        rule: The fields of a `ScalingRule`.
    """

    def __init__(self, **rule: Any) -> None:  # noqa: ANN401
        self._autoscaler = Autoscaler(ScalingRule(**rule))

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas from now on; Serve holds them within the bounds of its target capacity."""
        load = DeploymentLoad(
            num_requests=context.total_num_requests,
            num_running=context.current_num_replicas,
            num_replicas=context.target_num_replicas,
            signals=_signals(context.aggregated_metrics or {}),
        )
        return self._autoscaler.decide(load, context.current_time), {}


def _signals(metrics: dict[str, dict[Any, float]]) -> list[ReplicaSignals]:
    """Those of each replica that has told all of them."""
    names = [field.name for field in fields(ReplicaSignals)]
    replicas = set.intersection(*(set(metrics.get(name, ())) for name in names))
    return [
        ReplicaSignals(**{name: metrics[name][replica] for name in names}) for replica in replicas
    ]
