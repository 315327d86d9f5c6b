"""A server that a command line starts: watched, and ended with everything it started."""

import contextlib
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from gllm_ray.errors import ConfigError

_STOP_TIMEOUT_S = 30.0
_MAX_LOG_CHARS = 3000


class CommandProcess:
    """Runs a command, as a context manager.

    Args:
        words: The program and its arguments.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._log = tempfile.NamedTemporaryFile(prefix="gllm-bench-")  # noqa: SIM115 - see __exit__
        self._process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """The process; its descendants belong to it."""
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this process alone
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"{self._words[0]}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            root = psutil.Process(self.pid)
            tree = [root, *root.children(recursive=True)]
            self._process.send_signal(signal.SIGINT)
            _, alive = psutil.wait_procs(tree, timeout=_STOP_TIMEOUT_S)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
        self._log.close()

    def raise_if_ended(self) -> None:
        """Raise `RuntimeError` with the end of what it printed if it is not running any more."""
        if (status := self._process.poll()) is not None:
            log = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(
                f"{shlex.join(self._words)} ended with status {status}:\n{log[-_MAX_LOG_CHARS:]}"
            )
