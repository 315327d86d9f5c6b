"""Which attention a stage runs, where the operator comes from, and what happens without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gllm_ray.model.attention import reference
from gllm_ray.model.attention.backend import choose_attention
from gllm_ray.model.kv_cache import AttentionGeometry
from gllm_ray.model.operators import build
from gllm_ray.model.operators.build import OperatorsUnavailableError

CPU = torch.device("cpu")
PLAIN = AttentionGeometry(key_shape=(1, 8), value_shape=(1, 8), window=None, expand=None)
LATENT = AttentionGeometry(
    key_shape=(1, 8), value_shape=(1, 8), window=None, expand=lambda keys, values: (keys, values)
)
CHOOSE = """
import torch
from tests.unit.model.test_attention_backend import CPU, PLAIN, choose_attention

print(choose_attention(CPU, torch.float32, [PLAIN]).description)
"""
ROOT = Path(__file__).parents[3]


def choose_in_process(cache_home: Path, **environment: str) -> subprocess.Popen:
    """Start a process with an empty home that chooses, and prints what it runs."""
    return subprocess.Popen(
        [sys.executable, "-c", CHOOSE],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache_home), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def chosen(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return output.strip()


@pytest.fixture
def compiler():
    try:
        return build._find_compiler()
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def counting_compiler(compiler, tmp_path):
    """A compiler that adds a line to a file each time it runs."""
    script, count = tmp_path / "compiler", tmp_path / "count"
    script.write_text(f'#!/bin/sh\necho run >> "{count}"\nexec "{compiler}" "$@"\n')
    script.chmod(0o755)
    count.touch()
    return script, count


def test_processes_that_start_together_build_once_and_later_ones_need_no_compiler(
    counting_compiler, tmp_path
):
    script, count = counting_compiler
    cache_home = tmp_path / "cache"
    processes = [choose_in_process(cache_home, CXX=str(script)) for _ in range(3)]
    assert [chosen(process) for process in processes] == ["C++ operator"] * 3
    assert count.read_text() == "run\n"
    assert chosen(choose_in_process(cache_home, PATH="", CXX="")) == "C++ operator"
    left = sorted(path.name for path in cache_home.rglob("*") if path.is_file())
    assert left == ["lock", "operators.so"]


def test_without_a_compiler_torch_attends_and_the_description_says_why(tmp_path):
    assert chosen(choose_in_process(tmp_path, PATH="", CXX="")) == (
        "torch, slower than the C++ operator, because there is no C++ compiler "
        "(c++, g++, clang++) on PATH"
    )


def test_a_compiler_that_fails_leaves_torch_and_nothing_in_the_cache(tmp_path):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: no headers' >&2\nexit 1\n")
    script.chmod(0o755)
    description = chosen(choose_in_process(tmp_path / "cache", CXX=str(script)))
    assert description.endswith(f"{script} failed: x.cpp:1: fatal error: no headers")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_leaves_torch(compiler, tmp_path):
    (tmp_path / "file").touch()
    description = chosen(choose_in_process(tmp_path / "file"))
    assert description.startswith("torch, slower than the C++ operator, because ")


def test_another_cpu_or_torch_or_source_has_another_place_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [build._cache_directory(), build._cache_directory()]
    assert places[0] == places[1]
    assert tmp_path in places[0].parents
    (tmp_path / "source.cpp").write_text("int x;\n")
    for target, value in (
        (torch, ("__version__", "2.99.0")),
        (build, ("cpu_description", lambda: "another")),
        (build, ("_SOURCES", tmp_path)),
    ):
        monkeypatch.setattr(target, *value)
        places.append(build._cache_directory())
    assert len(set(places)) == 4


def test_what_the_operator_does_not_take_is_left_to_torch(compiler):
    assert choose_attention(CPU, torch.bfloat16, [PLAIN]).description == "C++ operator"
    for device, dtype, geometry, reason in (
        (CPU, torch.float16, PLAIN, "it does not take torch.float16"),
        (CPU, torch.float32, LATENT, "it does not take the latents this model caches"),
        (torch.device("cuda"), torch.float32, PLAIN, "torch"),
    ):
        backend = choose_attention(device, dtype, [PLAIN, geometry])
        assert backend.attend is reference.paged_attention
        assert backend.description.endswith(reason)
