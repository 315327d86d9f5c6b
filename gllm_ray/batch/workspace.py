"""Where a job keeps its manifest, its journal and its outputs.

Beside an output `answers.jsonl` lie `answers.jsonl.manifest.json`, `answers.jsonl.part`, the
journal, and in the end `answers.errors.jsonl`. On an object store, where no file can be appended
to, the part is a folder of segments that together are the journal.
"""

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from gllm_ray.batch.journal import sync_directory
from gllm_ray.batch.locations import is_remote, local_path, naming, open_remote
from gllm_ray.errors import ConfigError

_SAVE_INTERVAL_S = 30.0


class Workspace(Protocol):
    """Implemented for a local output, and for one on an object store.

    Attributes:
        journal_path: The local file of the journal.
    """

    journal_path: Path

    def has_output(self) -> bool:
        """Whether there is a file at the output's own place."""

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest; None before there is one."""

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, whole or not at all."""

    def save(self, *, is_last: bool) -> None:
        """Keep what the journal holds where a job on another machine finds it, if it is time."""

    def publish(self, write: Callable[[Path], None], *, is_errors: bool) -> None:
        """Put the output, or the file of errors, into its place, whole or not at all."""


@contextmanager
def open_workspace(output: str) -> Iterator[Workspace]:
    """The workspace of an output.

    Raises:
        ConfigError: Its directory is missing, or nothing installed knows its URI.
    """
    if not is_remote(output):
        yield LocalWorkspace(local_path(output))
        return
    with tempfile.TemporaryDirectory(prefix="gllm_ray_batch") as directory:
        yield RemoteWorkspace(output, Path(directory))


class LocalWorkspace:
    """Files beside the output; see `Workspace`."""

    def __init__(self, output: Path) -> None:
        if not output.parent.is_dir():
            raise ConfigError(f"{output}: there is no directory {output.parent}; make it first")
        self.journal_path = output.with_name(f"{output.name}.part")
        self._output = output
        self._manifest = output.with_name(f"{output.name}.manifest.json")

    def has_output(self) -> bool:
        """See `Workspace`."""
        return self._output.exists()

    def read_manifest(self) -> dict[str, Any] | None:
        """See `Workspace`."""
        if not self._manifest.exists():
            return None
        manifest: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """See `Workspace`."""
        self._replace(self._manifest, lambda path: _write_json(path, manifest))

    def save(self, *, is_last: bool) -> None:
        """The journal is where it belongs already."""

    def publish(self, write: Callable[[Path], None], *, is_errors: bool) -> None:
        """See `Workspace`."""
        name = errors_name(self._output.name) if is_errors else self._output.name
        self._replace(self._output.with_name(name), write)

    def _replace(self, path: Path, write: Callable[[Path], None]) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


class RemoteWorkspace:
    """Objects beside the output, and copies in a directory of this machine; see `Workspace`."""

    def __init__(self, output: str, directory: Path) -> None:
        self._location = output
        self._filesystem, self._output = open_remote(output)
        self._segments = f"{self._output}.part"
        self._manifest = f"{self._output}.manifest.json"
        self._directory = directory
        self.journal_path = directory / "part"
        with naming(output):
            names = self._find_segments()
            self.journal_path.write_bytes(b"".join(map(self._filesystem.cat_file, names)))
        self._num_segments = len(names)
        self._next_save_s = time.monotonic() + _SAVE_INTERVAL_S
        self._num_saved_bytes = self.journal_path.stat().st_size

    def has_output(self) -> bool:
        """See `Workspace`."""
        with naming(self._location):
            return bool(self._filesystem.exists(self._output))

    def read_manifest(self) -> dict[str, Any] | None:
        """See `Workspace`."""
        with naming(self._location):
            if not self._filesystem.exists(self._manifest):
                return None
            manifest: dict[str, Any] = json.loads(self._filesystem.cat_file(self._manifest))
            return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """See `Workspace`."""
        self._put(self._manifest, lambda path: _write_json(path, manifest))

    def save(self, *, is_last: bool) -> None:
        """Make a segment of what the journal gained, every half minute."""
        if not is_last and time.monotonic() < self._next_save_s:
            return
        self._next_save_s = time.monotonic() + _SAVE_INTERVAL_S
        with self.journal_path.open("rb") as journal:
            journal.seek(self._num_saved_bytes)
            segment = journal.read()
        if not segment:
            return
        # No name is used twice, so that no job ever overwrites what another one did.
        name = f"{self._num_segments:06d}-{uuid.uuid4().hex[:8]}.jsonl"
        with naming(self._location):
            self._filesystem.makedirs(self._segments, exist_ok=True)
            self._filesystem.pipe_file(f"{self._segments}/{name}", segment)
        self._num_segments += 1
        self._num_saved_bytes += len(segment)

    def publish(self, write: Callable[[Path], None], *, is_errors: bool) -> None:
        """See `Workspace`."""
        output = PurePosixPath(self._output)
        name = errors_name(output.name) if is_errors else output.name
        self._put(str(output.with_name(name)), write)

    def _find_segments(self) -> list[str]:
        if not self._filesystem.exists(self._segments):
            return []
        return sorted(self._filesystem.ls(self._segments, detail=False))

    def _put(self, remote: str, write: Callable[[Path], None]) -> None:
        temporary = self._directory / PurePosixPath(remote).name
        write(temporary)
        with naming(self._location):
            self._filesystem.put_file(str(temporary), remote)
        temporary.unlink()


def errors_name(output_name: str) -> str:
    """`answers.errors.jsonl` for `answers.jsonl`."""
    return f"{PurePosixPath(output_name).stem}.errors.jsonl"


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
