"""A pipeline across two hosts that a slow link joins."""

import json
import os
import shutil
import subprocess

import pytest

from tests.multinode.shaped_hosts import ShapedHosts


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
    outcomes = json.loads(hosts.run("tests.multinode.two_hosts", timeout_s=150).splitlines()[-1])
    one = outcomes.pop("one host")
    assert len(set(one["nodes"])) == 1
    assert all(len(tokens) == 24 for tokens in one["tokens"])
    for two in outcomes.values():
        assert len(set(two["nodes"])) == 2
        assert two["tokens"] == one["tokens"]
        # 400 rows of 192 floats take 123 ms at 20 Mbit/s, of which a burst is free.
        assert two["prompt_hop_s"] > 0.1 > one["prompt_hop_s"]
        assert two["prompt_hop_s"] > two["decode_hop_s"]
