"""The node of a stage goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.moments import MOMENTS


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_the_stage_of_a_lost_node_starts_on_another_and_no_token_changes():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("three local nodes on one core take minutes to start")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_node"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert [outcome["moment"] for outcome in outcomes] == list(MOMENTS)
    for outcome in outcomes:
        assert outcome["answers"] == outcome["expected"]
        assert outcome["open"] == [0, 0]
        assert outcome["before"][1] == outcome["lost"]
        assert outcome["after"][0] == outcome["before"][0]
        assert outcome["after"][1] not in outcome["before"]
    for line in ("the pipeline stands still: stage 1 (", "recovered, with a new stage 1 ("):
        assert done.stderr.count(line) == len(MOMENTS)
