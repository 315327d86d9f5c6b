"""The replica behind a front end dies, and the front end."""

import pytest

from gllm_ray.config import FRONT_END_NAME
from tests.faults.moments import MOMENTS
from tests.scenario import outcome_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def outcomes():
    return outcome_of("tests.faults.lost_front", timeout_s=290)


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
