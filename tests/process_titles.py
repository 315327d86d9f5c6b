"""The processes below one, by what they are called."""

import contextlib
import os

import psutil


def titles(root_pid: int | None = None) -> dict[int, str]:
    """The command line of every process below one, by process id; Ray puts an actor's name there.

    Args:
        root_pid: None: this process.
    """
    found = {}
    for process in psutil.Process(root_pid or os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found[process.pid] = " ".join(process.cmdline()).strip()
    return found
