"""Two replicas on a cluster that has no room for a third."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.two_replicas import NUM_CALLS, NUM_POSTS, NUM_PREFIXES, PREFIX_TOKENS


@pytest.mark.chaos
def test_prompts_find_the_prefix_they_share_and_a_lost_replica_is_replaced_in_its_place(directory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.two_replicas", "prefix_aware"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"RAY_TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    # All but the first of each prefix find it.
    called = NUM_PREFIXES * (NUM_CALLS - 1) * PREFIX_TOKENS
    posted = NUM_PREFIXES * (NUM_POSTS - 1) * PREFIX_TOKENS
    assert len(outcome["called"]) == 2
    assert sum(outcome["called"]) == called
    assert sum(outcome["posted"]) == called + posted
    assert outcome["num_placement_groups"] == 2
