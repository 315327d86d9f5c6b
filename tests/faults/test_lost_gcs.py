"""The process that keeps the state of the cluster dies, and comes back to what Redis kept."""

import pytest

from tests.faults.moments import MOMENTS
from tests.scenario import outcome_of


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_serving_goes_on_without_the_gcs_and_a_stage_is_replaced_when_it_is_back(redis):
    address, password = redis
    *alone, with_a_stage = outcome_of(
        "tests.faults.lost_gcs", password, timeout_s=230, RAY_REDIS_ADDRESS=address
    )
    assert [outcome["moment"] for outcome in alone] == list(MOMENTS)
    for outcome in (*alone, with_a_stage):
        assert outcome["answers"] == outcome["expected"]
        assert outcome["open"] == [0, 0]
        assert outcome["num_stages"] == 2
    assert [outcome["num_replaced"] for outcome in alone] == [0] * len(MOMENTS)
    assert all(outcome["is_served_without"] for outcome in alone)
    assert with_a_stage["num_replaced"] == 1
