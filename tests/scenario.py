"""Scenarios that are processes of their own, because they need a cluster of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def outcome_of(module, *arguments, timeout_s, **variables):
    """What a scenario found: the one line of JSON in what it and its libraries print.

    Args:
        module: Its `__main__` prints the line.
        arguments: Of its command line.
        timeout_s: How long it may take.
        variables: Set in its environment.
    """
    outcome, _ = outcome_and_log(module, *arguments, timeout_s=timeout_s, **variables)
    return outcome


def outcome_and_log(module, *arguments, timeout_s, **variables):
    """Also what it logged."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line for line in done.stdout.splitlines() if line.startswith(("{", "[{")))
    return json.loads(next(lines)), done.stderr
