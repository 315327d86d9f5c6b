"""The process that keeps the state of the cluster dies, and comes back to what Redis kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.moments import MOMENTS


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_serving_goes_on_without_the_gcs_and_a_stage_is_replaced_when_it_is_back(redis):
    address, password = redis
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_gcs", password],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"RAY_REDIS_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *alone, with_a_stage = json.loads(done.stdout.splitlines()[-1])
    assert [outcome["moment"] for outcome in alone] == list(MOMENTS)
    for outcome in (*alone, with_a_stage):
        assert outcome["answers"] == outcome["expected"]
        assert outcome["open"] == [0, 0]
        assert outcome["num_stages"] == 2
    assert [outcome["num_replaced"] for outcome in alone] == [0] * len(MOMENTS)
    assert all(outcome["is_served_without"] for outcome in alone)
    assert with_a_stage["num_replaced"] == 1
