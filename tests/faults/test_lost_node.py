"""The node of a stage goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.chaos
def test_the_stage_of_a_lost_node_starts_on_another_and_no_token_changes():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("three local nodes on one core take minutes to start")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_node"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["answers"] == outcome["expected"]
    assert outcome["before"][1] == outcome["lost"]
    assert outcome["after"][0] == outcome["before"][0]
    assert outcome["after"][1] not in outcome["before"]
