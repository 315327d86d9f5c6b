"""A job that is killed again and again, at moments nobody chose."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.local_job import make_line, read_lines, run_job, write_lines

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 100.0


def start(source, output):
    program = "tests.batch.local_job"
    command = [sys.executable, "-m", program, str(source), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def kill_while_it_writes(process, journal, chance):
    """SIGKILL at a random moment after the first new record; False if it had ended before."""
    size = journal.stat().st_size if journal.exists() else 0
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and (not journal.exists() or journal.stat().st_size == size):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    return process.wait() == -signal.SIGKILL


def texts(records):
    return {
        record["custom_id"]: record["response"]["body"]["choices"][0]["message"]["content"]
        for record in records
    }


def check_kills(num_kills, num_rows, tmp_path, tokenizer):
    names = [f"row {i}" for i in range(num_rows)]
    source = write_lines(tmp_path / "in.jsonl", [make_line(name) for name in names])
    output = tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.part"
    chance = random.Random(num_kills)
    sizes = []
    for _ in range(num_kills):
        assert kill_while_it_writes(start(source, output), journal, chance)
        assert not output.exists()
        sizes.append(journal.stat().st_size)
    assert sizes == sorted(set(sizes))  # each run went on from where the one before was
    assert start(source, output).wait(START_LIMIT_S) == 0

    records = read_lines(output)
    assert [record["custom_id"] for record in records] == names
    assert sorted(record["custom_id"] for record in read_lines(journal)) == sorted(names)
    asyncio.run(run_job(source, str(tmp_path / "unbroken.jsonl"), tokenizer))
    assert texts(records) == texts(read_lines(tmp_path / "unbroken.jsonl"))


def test_no_row_is_lost_or_doubled_by_kills(tmp_path, tokenizer):
    check_kills(2, 60, tmp_path, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_row_is_lost_or_doubled_by_twenty_kills(tmp_path, tokenizer):
    check_kills(20, 800, tmp_path, tokenizer)
