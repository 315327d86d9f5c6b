"""How far a job is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from gllm_ray.batch.records import is_success

_LOG_INTERVAL_S = 10.0


class Progress:
    """Rows a second, tokens a second and the time left, on stderr.

    Args:
        num_rows: Of the whole job.
        num_done: Those of earlier runs.
    """

    def __init__(self, *, num_rows: int, num_done: int) -> None:
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_rows,
            initial=num_done,
            unit="row",
            mininterval=0.5 if is_terminal else _LOG_INTERVAL_S,
            bar_format=None if is_terminal else "{l_bar}{bar}{r_bar}\n",
        )
        self._start_s: float | None = None
        self._num_tokens = 0
        self._num_failed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def start(self) -> None:
        """Rates count from now: the pipeline has started."""
        self._start_s = time.monotonic()
        self._bar.unpause()

    def note(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Rows have ended."""
        num_rows = 0
        for record in records:
            num_rows += 1
            self._num_failed += not is_success(record)
            usage = record["response"]["body"].get("usage") or {}
            self._num_tokens += usage.get("completion_tokens", 0)
        elapsed_s = time.monotonic() - (self._start_s or time.monotonic())
        rate = self._num_tokens / elapsed_s if elapsed_s > 0 else 0.0
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {self._num_failed} failed", refresh=False)
        self._bar.update(num_rows)
