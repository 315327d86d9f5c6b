"""Ray kills a stage for the memory that it takes."""

import psutil
import pytest

from tests.faults.out_of_memory import HOARD_BYTES
from tests.faults.replicas import CAUSE, RECOVERED
from tests.scenario import outcome_and_log


@pytest.mark.chaos
@pytest.mark.timeout(120)
def test_a_stage_that_ray_kills_for_its_memory_is_replaced_and_no_token_changes(control_plane):
    if psutil.virtual_memory().available < 2 * HOARD_BYTES:
        pytest.skip(f"needs {2 * HOARD_BYTES >> 30} GiB of free memory")
    outcome, log = outcome_and_log("tests.faults.out_of_memory", control_plane, timeout_s=110)
    assert outcome["answers"] == outcome["expected"]
    assert outcome["open"] == [0, 0]
    assert outcome["is_replaced"][1]
    # Ray may kill another one before the memory of the first is free.
    causes = [line for line in log.splitlines() if CAUSE in line]
    assert causes
    assert all("memory" in cause for cause in causes)
    assert RECOVERED in log
