"""Builds the C++ attention operator, once for each torch, CPU and source, and loads it."""

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

_SOURCE = Path(__file__).with_name("paged_attention.cpp")
_LIBRARY = "paged_attention.so"
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10, the oldest that is supported
)
_TIMEOUT_S = 120


class OperatorUnavailableError(Exception):
    """The operator cannot be built or loaded here; says why."""


@cache
def load_operator() -> torch._ops.OpOverload:
    """The operator `gllm_ray::paged_attention`, built if no earlier process did.

    Raises:
        OperatorUnavailableError: There is no compiler, or it fails, or its result does not load.
    """
    try:
        torch.ops.load_library(_build())
    except OSError as error:
        raise OperatorUnavailableError(str(error)) from error
    return torch.ops.gllm_ray.paged_attention.default


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
    parts = (torch.__version__, _cpu(), *_FLAGS, _SOURCE.read_text(encoding="utf-8"))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return root / "gllm_ray" / "operators" / digest[:16]


def _cpu() -> str:
    """What `-march=native` may depend on; nodes of several kinds may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    described = {line for line in lines if line.partition("\t")[0].strip() in kinds}
    return "\n".join([platform.machine(), platform.processor(), *sorted(described)])


def _find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise OperatorUnavailableError(f"there is no C++ compiler ({', '.join(names)}) on PATH")


def _compile(compiler: str, library: Path) -> None:
    # Only who builds waits for its import.
    from torch.utils.cpp_extension import include_paths, library_paths

    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *_FLAGS, native, str(_SOURCE), "-o", str(library)]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()]
    command += ["-ltorch_cpu", "-lc10"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OperatorUnavailableError(f"{compiler} took longer than {_TIMEOUT_S} s") from error
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        reason = (errors or result.stderr.splitlines() or ["no message"])[0]
        raise OperatorUnavailableError(f"{compiler} failed: {reason}")
