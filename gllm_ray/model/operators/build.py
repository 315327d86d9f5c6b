"""Builds the C++ operators, once for each torch, CPU and source, and loads them."""

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
_LIBRARY = "operators.so"
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10, the oldest that is supported
)
_TIMEOUT_S = 300
_MAX_REASON = 300  # characters of a compiler's message, for one line of the log


class OperatorsUnavailableError(Exception):
    """The operators cannot be built or loaded here; says why."""


def load_operators() -> torch._ops._OpNamespace:
    """The operators `torch.ops.gllm_ray`, built if no earlier process did.

    Raises:
        OperatorsUnavailableError: There is no compiler, or it fails, or its result does not load.
    """
    if (reason := _load_once()) is not None:
        raise OperatorsUnavailableError(reason)
    return torch.ops.gllm_ray


@cache
def _load_once() -> str | None:
    """Load the operators; returns why they are not there, or None if they are."""
    try:
        library = _build()
    except (OperatorsUnavailableError, OSError, RuntimeError) as error:
        return str(error)
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library} does not load ({error.__cause__ or error}); remove it to build it again"
    return None


def _build() -> Path:
    """Compile into the cache unless it is there; processes that start together build once."""
    library = _cache_directory() / _LIBRARY
    if library.exists():
        return library
    compiler = _find_compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                built = Path(directory) / _LIBRARY
                _compile(compiler, built)
                built.replace(library)
    return library


def _cache_directory() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.glob("*.[ch]*"))]
    parts = (torch.__version__, cpu_description(), *_FLAGS, *sources)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return root / "gllm_ray" / "operators" / digest[:16]


@cache
def cpu_description() -> str:
    """What `-march=native` may depend on; nodes of several kinds may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    described = {line for line in lines if line.partition(":")[0].strip() in kinds}
    return "\n".join([platform.machine(), platform.processor(), *sorted(described)])


def _find_compiler() -> list[str]:
    """The command that compiles: `CXX`, which may have arguments, or the first that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        words = name.split()
        if words and (path := shutil.which(words[0])) is not None:
            return [path, *words[1:]]
    raise OperatorsUnavailableError(f"there is no C++ compiler ({', '.join(names)}) on PATH")


def _compile(compiler: list[str], library: Path) -> None:
    # Only who builds waits for its import.
    from torch.utils.cpp_extension import include_paths, library_paths

    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler, *_FLAGS, native, *map(str, sorted(_SOURCES.glob("*.cpp")))]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()]
    command += ["-ltorch_cpu", "-lc10", "-o", str(library)]
    name = " ".join(compiler)
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # errors are found by their English names
        start_new_session=True,
    ) as process:
        try:
            _, messages = process.communicate(timeout=_TIMEOUT_S)
        except BaseException as error:
            # A compiler is a driver of processes that would outlive it.
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise OperatorsUnavailableError(f"{name} took longer than {_TIMEOUT_S} s") from error
    if process.returncode:
        raise OperatorsUnavailableError(f"{name} failed: {_reason(messages.splitlines())}")


def _reason(lines: list[str]) -> str:
    """The first error; drivers say that the linker failed, but it is the linker that says why."""
    drivers = ("collect2: ", "linker command failed")
    errors = [line for line in lines if "error:" in line and not any(d in line for d in drivers)]
    return (errors or lines or ["no message"])[0][:_MAX_REASON]
