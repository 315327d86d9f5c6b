"""The replica behind a front end dies, and the front end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gllm_ray.config import FRONT_END_NAME
from tests.faults.moments import MOMENTS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_front"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def check(outcomes):
    assert [outcome["moment"] for outcome in outcomes] == list(MOMENTS)
    for outcome in outcomes:
        assert outcome["is_replaced"]
        assert outcome["open"] == [0, 0]


def test_clients_of_a_front_end_get_all_of_their_answers_when_the_replica_dies(outcomes):
    check(outcomes["demo"])
    for outcome in outcomes["demo"]:
        assert outcome["answers"] == outcome["expected"]


def test_clients_of_a_front_end_that_dies_get_an_error_at_once_and_nothing_stays_open(outcomes):
    check(outcomes[FRONT_END_NAME])
    for outcome in outcomes[FRONT_END_NAME]:
        for answer, expected in zip(outcome["answers"], outcome["expected"], strict=True):
            assert isinstance(answer, str) or answer == expected
        assert any(isinstance(answer, str) for answer in outcome["answers"])
        assert outcome["seconds"] < 10
