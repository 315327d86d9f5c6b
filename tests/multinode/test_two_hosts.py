"""The demo service's pipeline across two nodes, and two hosts that a slow link joins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multinode.shaped_hosts import ShapedHosts

PROGRAM = "tests.multinode.two_hosts"


def check(one, two):
    assert len(set(one["nodes"])) == 1
    assert len(set(two["nodes"])) == 2
    assert all(len(tokens) == 24 for tokens in one["tokens"])
    assert two["tokens"] == one["tokens"]


@pytest.mark.chaos
def test_tokens_are_the_same_on_two_nodes():
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(**json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def hosts():
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, ip and tc")
    with ShapedHosts("20mbit") as hosts:
        try:
            hosts.join()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{' '.join(error.cmd)}: {error.stderr.decode().strip()}")
        hosts.start_ray()
        yield hosts


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_tokens_are_the_same_across_a_slow_link_which_shows_in_the_hops(hosts):
    outcomes = json.loads(hosts.run(PROGRAM, timeout_s=150).splitlines()[-1])
    one = outcomes.pop("one")
    for two in outcomes.values():
        check(one, two)
        # 400 rows of 192 floats take 123 ms at 20 Mbit/s, of which a burst is free.
        assert two["prompt_hop_s"] > 0.1 > one["prompt_hop_s"]
        assert two["prompt_hop_s"] > two["decode_hop_s"]
