"""What a job has done, on a disk: whoever goes on with it finds every row that is in it."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gllm_ray.batch.records import encode_record, is_success
from gllm_ray.errors import ConfigError


class Journal:
    """An append-only file of records; of several with one id the last counts.

    A record is in it for good when `append` returns. What a kill or a full disk left of the last
    line is cut off.

    Args:
        path: Made where it is not there; locked while the journal is open.

    Raises:
        ConfigError: Another job has it open, or it is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, bool]] = {}  # where its record lies, and of what kind
        self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self._end = self._recover()
        except BaseException:
            self._file.close()
            raise
        sync_directory(path.parent)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, and return when the disk has them."""
        end, places, lines = self._end, {}, bytearray()
        for record in records:
            places[record["custom_id"]] = (end + len(lines), is_success(record))
            lines += encode_record(record)
        if not lines:
            return
        view = memoryview(lines)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())
        self._places |= places
        self._end = end + len(lines)

    def is_done(self, custom_id: str, *, with_success: bool = False) -> bool:
        """Whether a row has a record, or one of a success."""
        _, is_good = self._places.get(custom_id, (0, None))
        return bool(is_good) if with_success else is_good is not None

    @property
    def num_done(self) -> int:
        """Rows with a record."""
        return len(self._places)

    @property
    def num_failed(self) -> int:
        """Rows whose last record is of a failure."""
        return sum(not is_good for _, is_good in self._places.values())

    def read(self, custom_id: str) -> dict[str, Any]:
        """The last record of a row that is done."""
        place, _ = self._places[custom_id]
        with self._path.open("rb") as file:
            file.seek(place)
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self._path}: another job writes it; wait for its end, or give another --output"
            ) from None

    def _recover(self) -> int:
        """Index the records, and cut off a torn last one; where the next one begins."""
        end = 0
        size = self._file.seek(0, os.SEEK_END)
        with self._path.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    place = (record["custom_id"], (end, is_success(record)))
                except (ValueError, KeyError, TypeError):
                    place = None
                if place is None or not line.endswith(b"\n"):
                    if end + len(line) < size:
                        raise ConfigError(
                            f"{self._path}: byte {end} begins a line that is no record, and not "
                            "the last; remove the file to start again"
                        )
                    break
                self._places[place[0]] = place[1]
                end += len(line)
        if end < size:
            self._file.truncate(end)
            os.fsync(self._file.fileno())
        return end


def sync_directory(path: Path) -> None:
    """Return when the disk has the names of a directory's files."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
