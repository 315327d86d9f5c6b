"""Two replicas on a cluster that has no room for a third."""

import pytest

from tests.e2e.two_replicas import NUM_CALLS, NUM_POSTS, NUM_PREFIXES, PREFIX_TOKENS
from tests.scenario import outcome_of


@pytest.mark.chaos
@pytest.mark.timeout(180)
def test_prompts_find_the_prefix_they_share_and_a_lost_replica_is_replaced_in_its_place(directory):
    outcome = outcome_of(
        "tests.e2e.two_replicas", "prefix_aware", timeout_s=170, RAY_TMPDIR=str(directory)
    )
    # All but the first of each prefix find it.
    called = NUM_PREFIXES * (NUM_CALLS - 1) * PREFIX_TOKENS
    posted = NUM_PREFIXES * (NUM_POSTS - 1) * PREFIX_TOKENS
    assert len(outcome["called"]) == 2
    assert sum(outcome["called"]) == called
    assert sum(outcome["posted"]) == called + posted
    assert outcome["num_placement_groups"] == 2
