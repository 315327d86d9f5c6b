"""Files by path or by URI: local ones, and those of object stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fsspec.implementations.arrow import ArrowFSWrapper

from gllm_ray.errors import ConfigError

try:
    from pyarrow import ArrowException
except ImportError:  # without the data extra no store raises it
    ArrowException = OSError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_LOCAL = "file://"
# pyarrow brings its own clients of these; fsspec would need a package for each.
_OF_PYARROW = ("s3", "gs")
# Google's client would try for a quarter of an hour, also if it finds no credentials.
_GS_RETRY = "retry_limit_seconds"
_GS_RETRY_S = 60


class _ObjectStore(ArrowFSWrapper):
    """A client of pyarrow's as one of fsspec's."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: objects need no folder, and asking for a bucket may not be permitted."""


def is_remote(location: str) -> bool:
    """Whether a location is not of this machine's file system."""
    return "://" in location.removeprefix(_LOCAL)


def local_path(location: str) -> Path:
    """The path of a location that is not remote."""
    return Path(location.removeprefix(_LOCAL))


def open_remote(location: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URI, and its path there.

    Raises:
        ConfigError: Nothing that is installed knows the URI's scheme.
    """
    scheme = location.partition("://")[0]
    try:
        if scheme in _OF_PYARROW:
            from pyarrow.fs import FileSystem

            uri = location
            if scheme == "gs" and f"{_GS_RETRY}=" not in uri:
                uri += f"{'&' if '?' in uri else '?'}{_GS_RETRY}={_GS_RETRY_S}"
            filesystem, path = FileSystem.from_uri(uri)
            return _ObjectStore(filesystem), path
        from fsspec.core import url_to_fs

        return url_to_fs(location)
    except (ImportError, ValueError) as error:
        is_missing = isinstance(error, ImportError) and scheme in _OF_PYARROW
        hint = "; pip install 'gllm_ray[data]'" if is_missing else ""
        raise ConfigError(f"{location}: cannot be opened: {error}{hint}") from error


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Errors of a store name the location, for not every store's own do, and take one line.

    Raises:
        OSError: With what the store told.
    """
    try:
        yield
    except (OSError, ArrowException) as error:
        raise OSError(f"{location}: {' '.join(str(error).split())}") from error


def fetch(location: str, directory: Path) -> Path:
    """A file as a local one; a remote one is copied into a directory.

    Raises:
        ConfigError: There is no such file.
        OSError: Its store refuses, or cannot be reached.
    """
    if not is_remote(location):
        path = local_path(location)
        if not path.is_file():
            raise ConfigError(f"{location}: there is no such file")
        return path
    filesystem, remote = open_remote(location)
    path = directory / Path(remote).name
    with naming(location):
        try:
            filesystem.get_file(remote, str(path))
        except FileNotFoundError:
            raise ConfigError(f"{location}: there is no such file") from None
    return path
