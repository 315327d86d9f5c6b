"""Two models behind a front end: `configs/two_models.yaml`."""

import json
import tempfile

import pytest

from tests.scenario import outcome_of

pytestmark = pytest.mark.timeout(240)
SOON_S = 20  # sooner than the end of what was asked


def outcomes(directory, *scenarios, **deployment):
    return outcome_of(
        "tests.e2e.front_end",
        json.dumps(deployment),
        *scenarios,
        timeout_s=230,
        RAY_TMPDIR=str(directory),
    )


@pytest.fixture(scope="module")
def outcome():
    with tempfile.TemporaryDirectory(
        prefix="gllm-", dir="/tmp", ignore_cleanup_errors=True
    ) as path:
        yield outcomes(path, "models", "lost_replica")


def test_both_models_are_served_at_one_address_and_an_unknown_one_names_them(outcome):
    check_models(outcome["models"])


def check_models(models):
    assert models["listed"] == [["demo", 512], ["demo-bfloat16", 512]]
    assert models["info"] == [["demo", 1], ["demo-bfloat16", 1]]
    assert models["health"] == 200
    assert "this server has 'demo', 'demo-bfloat16'" in models["answers"]["unknown"]
    for model in ("demo", "demo-bfloat16"):
        texts, reasons, usage = models["answers"][model]
        assert texts[0][1]
        assert reasons[0][1] in ("stop", "length")
        assert usage["completion_tokens"] > 1


def test_answers_are_those_without_the_death_of_the_only_replica(outcome):
    lost = outcome["lost_replica"]
    assert lost["killed"] == 1
    assert lost["answers"] == lost["expected"]
    assert lost["kv_utilization"] == 0
    texts, reasons, usage = lost["answers"][-1]
    assert len(json.loads(texts[0][1])) == 20
    assert reasons == [[0, "stop"]]
    assert usage["num_scored"] == usage["completion_tokens"]


@pytest.mark.slow
def test_a_client_that_leaves_ends_its_requests_in_the_replica(directory):
    leaving = outcomes(directory, "leaving_client")["leaving_client"]
    assert '"choices"' in leaving["first_line"]
    assert leaving["left"] == "ReadTimeout"
    assert all(leaving["open"])
    for seconds, load in leaving["idle"]:
        assert seconds < SOON_S
        assert load["kv_utilization"] == 0


@pytest.mark.chaos
def test_answers_go_on_at_another_replica_at_once(directory):
    scenarios = outcomes(directory, "lost_replica", min_replicas=2, max_replicas=2)
    lost = scenarios["lost_replica"]
    assert lost["killed"] == 1
    assert lost["answers"] == lost["expected"]
    assert lost["pause_s"] < 2, "a new replica takes longer"


@pytest.mark.chaos
def test_a_front_end_that_dies_ends_its_streams_and_who_comes_then_waits_for_the_next(directory):
    outcome = outcomes(directory, "lost_front_end", "models")
    check_models(outcome["models"])
    lost = outcome["lost_front_end"]
    assert lost["open"] > 1
    assert lost["error"] is not None, "the stream must not look whole"
    assert lost["end_s"] < 5
    assert lost["idle_s"] < SOON_S
    assert lost["kv_utilization"] == 0


@pytest.mark.slow
def test_a_request_waits_at_the_front_end_for_the_first_replica(directory):
    first = outcomes(directory, "first_request", min_replicas=0)["first_request"]
    assert first["before"] == [], "nothing that was asked before needs a replica"
    assert first["listed"] == 2
    assert first["running"] == [0, 0]
    assert first["usage"]["completion_tokens"] > 1
    assert first["after"] == [1, 0]


@pytest.mark.slow
def test_no_answer_changes_while_all_is_redeployed(directory):
    redeployed = outcomes(directory, "redeployment", graceful_shutdown_timeout_s=0)["redeployment"]
    assert len(redeployed["rounds"]) > 1
    for answers in redeployed["rounds"]:
        assert answers == redeployed["expected"]
