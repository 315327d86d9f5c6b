"""A service that stands still while another is measured."""

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def standing_still(pid: int | None) -> Iterator[None]:
    """Stop a process and its descendants, and let them go on at the end.

    Args:
        pid: The root; None: nothing is stopped.
    """
    stopped: list[psutil.Process] = []
    try:
        # A process that was not stopped yet may have started others meanwhile.
        while running := [process for process in _tree(pid) if process not in stopped]:
            for process in running:
                stopped.append(process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _tree(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []
