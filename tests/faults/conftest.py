"""What holds after every fault."""

import pytest

from tests.faults.replicas import check_nothing_is_left_behind


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Whatever a test broke, no actor and no placement group outlives the replica it was of."""
    yield
    check_nothing_is_left_behind()
