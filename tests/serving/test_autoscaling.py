"""The autoscaler as Ray Serve's controller calls it."""

from ray.serve._private.autoscaling_state import _apply_autoscaling_config, _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from gllm_ray.autoscaling_config import ScalingRule
from gllm_ray.serving.autoscaling import autoscaling_options

DEPLOYMENT = DeploymentID("LLMServer", "demo")
REPLICAS = [ReplicaID(name, DEPLOYMENT) for name in ("a", "b")]
RULE = ScalingRule(
    min_replicas=0, max_replicas=5, target_queue_time_s=2.0, upscale_delay_s=3, downscale_delay_s=6
)


class Controller:
    """Asks the policy as Serve does, which wraps it in a rule of its own."""

    def __init__(self):
        self._config = AutoscalingConfig(**autoscaling_options(RULE))
        self._policy = _apply_autoscaling_config(_resolve_policy_callable(self._config.policy))
        self._state = {}

    def ask(self, now_s, num_replicas, *, num_requests=0, metrics=None, num_running=None):
        num_running = num_replicas if num_running is None else num_running
        context = AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name=DEPLOYMENT.name,
            app_name=DEPLOYMENT.app_name,
            current_num_replicas=num_running,
            target_num_replicas=num_replicas,
            running_replicas=REPLICAS[:num_running],
            total_num_requests=num_requests,
            total_queued_requests=0,
            aggregated_metrics=metrics,
            raw_metrics=None,
            capacity_adjusted_min_replicas=RULE.min_replicas,
            capacity_adjusted_max_replicas=RULE.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
        number, self._state = self._policy(context)
        return number


def told(num_waiting_tokens, arriving_tokens_per_s=0.0):
    return {
        "num_waiting_tokens": dict.fromkeys(REPLICAS, num_waiting_tokens),
        "arriving_tokens_per_s": dict.fromkeys(REPLICAS, arriving_tokens_per_s),
        "drain_tokens_per_s": dict.fromkeys(REPLICAS, 1000.0),
        "prefill_capacity_tokens_per_s": dict.fromkeys(REPLICAS, 1000.0),
        "kv_utilization": dict.fromkeys(REPLICAS, 0.0),
        "running_requests": dict.fromkeys(REPLICAS, 7.0),  # Serve's own
    }


def test_serve_wants_what_the_rule_wants_and_no_sooner_or_later():
    controller = Controller()
    queued = told(3000.0, 500.0)  # 3 s for each of two, where 2 s are the target
    assert [controller.ask(s, 2, metrics=queued) for s in (0, 2.9, 3)] == [2, 2, 3]
    assert [controller.ask(s, 3, metrics=told(0.0)) for s in (4, 9.9, 10)] == [3, 3, 1]
    assert [controller.ask(s, 1, metrics=told(0.0)) for s in (11, 16.9, 17)] == [1, 1, 0]


def test_the_first_request_starts_a_replica_at_once_and_no_second_while_it_starts():
    controller = Controller()
    assert controller.ask(0, 0) == 0
    assert controller.ask(1, 0, num_requests=1) == 1
    assert [controller.ask(s, 1, num_running=0, num_requests=9) for s in (2, 30)] == [1, 1]


def test_a_replica_that_has_not_told_yet_counts_for_nothing():
    controller = Controller()
    assert [controller.ask(s, 2, metrics=None, num_requests=100) for s in (0, 60)] == [2, 2]
    metrics = told(8000.0, 2000.0)
    del metrics["kv_utilization"][REPLICAS[1]]
    # Of one replica, and no more than twice the running ones: 4 times its target.
    assert [controller.ask(s, 2, metrics=metrics) for s in (61, 64)] == [2, 4]
