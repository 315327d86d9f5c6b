"""The node of a stage goes."""

import os

import pytest

from tests.faults.moments import MOMENTS
from tests.scenario import outcome_and_log


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_the_stage_of_a_lost_node_starts_on_another_and_no_token_changes(control_plane):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("three local nodes on one core take minutes to start")
    outcomes, log = outcome_and_log("tests.faults.lost_node", control_plane, timeout_s=230)
    assert [outcome["moment"] for outcome in outcomes] == list(MOMENTS)
    for outcome in outcomes:
        assert outcome["answers"] == outcome["expected"]
        assert outcome["open"] == [0, 0]
        assert outcome["before"][1] == outcome["lost"]
        assert outcome["after"][0] == outcome["before"][0]
        assert outcome["after"][1] not in outcome["before"]
    for line in ("the pipeline stands still: stage 1 (", "recovered, with a new stage 1 ("):
        assert log.count(line) == len(MOMENTS)
