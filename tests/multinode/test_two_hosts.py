"""The demo service's pipeline across two nodes, and two hosts that a slow link joins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.multinode.shaped_hosts import ShapedHosts
from tests.multinode.two_hosts import NUM_PROMPTS

PROGRAM = "tests.multinode.two_hosts"


def check(one, two):
    assert len(set(one["nodes"])) == 1
    assert len(set(two["nodes"])) == 2
    assert all(len(tokens) == 24 for tokens in one["tokens"])
    assert two["tokens"] == one["tokens"]


def hops_s(outcome):
    """Of the prompts and of decodes, the medians that the trace shows."""
    events = json.loads(Path(outcome["trace"]).read_text())["traceEvents"]
    starts, ends = (
        {each["id"]: each["ts"] for each in events if each["ph"] == phase and each["cat"] == "hop"}
        for phase in "be"
    )
    assert len(starts) >= 24 * NUM_PROMPTS
    times_s = sorted((ends[key] - start) / 1e6 for key, start in starts.items())
    # Micro-batches of prompts have the most rows.
    return median(times_s[-NUM_PROMPTS:]), median(times_s[:-NUM_PROMPTS])


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_tokens_are_the_same_on_two_nodes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
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
@pytest.mark.timeout(480)
def test_tokens_are_the_same_across_a_slow_link_whose_hops_the_trace_shows(hosts, tmp_path):
    told = hosts.run(PROGRAM, tmp_path, timeout_s=300)
    outcomes = json.loads(told.splitlines()[-1])
    one = outcomes.pop("one")
    near_prompt_hop_s, _ = hops_s(one)
    for two in outcomes.values():
        check(one, two)
        prompt_hop_s, decode_hop_s = hops_s(two)
        # 400 rows of 192 floats take 123 ms at 20 Mbit/s, of which a burst is free.
        assert prompt_hop_s > 0.1 > near_prompt_hop_s
        assert prompt_hop_s < 0.5
        assert prompt_hop_s > decode_hop_s
