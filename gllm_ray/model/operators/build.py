"""Builds the C++ operators, once for each torch, CPU and source, and loads them."""

import fcntl
import hashlib
import os
import platform
import shutil
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
        torch.ops.load_library(_build())
    except (OperatorsUnavailableError, OSError, RuntimeError) as error:
        return str(error)
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


def _find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise OperatorsUnavailableError(f"there is no C++ compiler ({', '.join(names)}) on PATH")


def _compile(compiler: str, library: Path) -> None:
    # Only who builds waits for its import.
    from torch.utils.cpp_extension import include_paths, library_paths

    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *_FLAGS, native, *map(str, sorted(_SOURCES.glob("*.cpp")))]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()]
    command += ["-ltorch_cpu", "-lc10", "-o", str(library)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OperatorsUnavailableError(f"{compiler} took longer than {_TIMEOUT_S} s") from error
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        reason = (errors or result.stderr.splitlines() or ["no message"])[0]
        raise OperatorsUnavailableError(f"{compiler} failed: {reason}")
