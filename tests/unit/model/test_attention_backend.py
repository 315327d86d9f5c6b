"""Which attention a stage runs, where the operator comes from, and what happens without it."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from torch import nn

from gllm_ray.errors import ConfigError
from gllm_ray.model.attention import reference
from gllm_ray.model.attention.backend import AttentionSetting, Gpu, choose_attention
from gllm_ray.model.attention.latent_projection import LatentProjection
from gllm_ray.model.kv_cache import AttentionGeometry
from gllm_ray.model.operators import build
from gllm_ray.model.operators.build import OperatorsUnavailableError

PLAIN = AttentionGeometry(key_shape=(1, 64), value_shape=(1, 64), window=None)


def latent_geometry(rank, key_width=192):
    """As DeepSeek's where `rank` is 512."""
    num_heads, value_width, rotary_width = 16, 128, 64
    width = num_heads * (key_width - rotary_width + value_width)
    with torch.device("meta"):
        linear = nn.Linear(rank, width, bias=False)
    projection = LatentProjection(
        linear=linear,
        num_heads=num_heads,
        key_width=key_width,
        value_width=value_width,
        rotary_width=rotary_width,
    )
    return AttentionGeometry(
        key_shape=(1, rank + rotary_width), value_shape=(1, rank), window=None, latent=projection
    )


LATENT = latent_geometry(512)
CHOOSE = """
from tests.unit.model.test_attention_backend import choose

print(choose("auto").description)
"""
ROOT = Path(__file__).parents[3]


def choose(name, geometry=PLAIN, dtype=torch.float32, gpu=None, block_size=16):
    setting = AttentionSetting(
        gpu=gpu, dtype=dtype, geometries=(PLAIN, geometry), block_size=block_size
    )
    return choose_attention(name, setting)


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
        return " ".join(build._find_compiler())
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def counting_compiler(compiler, tmp_path):
    """A compiler that adds a line to a file each time it runs, and makes slow code soon."""
    script, count = tmp_path / "compiler", tmp_path / "count"
    script.write_text(f'#!/bin/sh\necho run >> "{count}"\nexec {compiler} "$@" -O0\n')
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


def make_script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="latin-1")
    path.chmod(0o755)
    return path


def test_a_compiler_that_fails_leaves_torch_and_nothing_in_the_cache(tmp_path):
    script = make_script(
        tmp_path / "compiler", "echo 'x.cpp:1: fatal error: no headers' >&2\nexit 1"
    )
    description = chosen(choose_in_process(tmp_path / "cache", CXX=str(script)))
    assert description.endswith(f"{script} failed: x.cpp:1: fatal error: no headers")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("x.cpp:1: error: \xab", "x.cpp:1: error: \ufffd"),  # in no encoding of ours
        ("error: " + 1000 * "x", "error: " + 293 * "x"),
        (
            "ld: No space left on device\ncollect2: error: ld returned 1",
            "ld: No space left on device",
        ),
        ("ld: no -lc10\nclang: error: linker command failed", "ld: no -lc10"),
        ("a.cpp: warning\na.cpp: error: 1\na.cpp: error: 2", "a.cpp: error: 1"),
    ],
)
def test_of_what_a_compiler_says_one_short_line_is_told(messages, reason, tmp_path):
    script = make_script(tmp_path / "compiler", f"echo '{messages}' >&2\nexit 1")
    with pytest.raises(OperatorsUnavailableError) as caught:
        build._compile([str(script)], tmp_path / "library")
    assert str(caught.value) == f"{script} failed: {reason}"


def test_a_compiler_that_hangs_is_ended_with_the_processes_it_drives(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_TIMEOUT_S", 1)
    script = make_script(tmp_path / "compiler", f"sleep 60 &\necho $! > {tmp_path}/pid\nwait")
    with pytest.raises(OperatorsUnavailableError, match="took longer than 1 s"):
        build._compile([str(script)], tmp_path / "library")
    driven = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(driven) and psutil.Process(driven).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_compiler_may_be_given_with_arguments(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"env {compiler}")
    assert build._find_compiler() == [shutil.which("env"), *compiler.split()]


def test_a_damaged_library_in_the_cache_leaves_torch_and_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build._cache_directory() / "operators.so"
    library.parent.mkdir(parents=True)
    library.touch()
    description = chosen(choose_in_process(tmp_path))
    assert description.endswith(
        f"because {library} does not load ({library}: file too short); remove it to build it again"
    )


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
    assert choose("auto", dtype=torch.bfloat16).description == "C++ operator"
    reason = "it does not take torch.float16"
    backend = choose("auto", dtype=torch.float16)
    assert backend.attend is reference.paged_attention
    assert backend.description == f"torch, slower than the C++ operator, because {reason}"
    with pytest.raises(ConfigError, match=rf"attention_backend='cpp': cannot .*, because {reason}"):
        choose("cpp", dtype=torch.float16)


def test_torch_runs_where_it_is_asked_for(compiler):
    backend = choose("torch")
    assert backend.attend is reference.paged_attention
    assert backend.description == "torch"


H100 = Gpu(capability=(9, 0), num_processors=132)
HALF = torch.bfloat16
WIDE = replace(PLAIN, key_shape=(1, 512))
UNEQUAL = replace(PLAIN, key_shape=(2, 64), value_shape=(2, 128))
WINDOW, CAP, SINKS = (
    replace(PLAIN, **feature)
    for feature in ({"window": 8}, {"has_softcap": True}, {"has_sinks": True})
)


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        *((name, {"gpu": None}, "GPUs only") for name in ("triton", "xformers", "flash3")),
        *(
            (name, {"gpu": Gpu((7, 5), 40)}, "a GPU of compute capability 7.5")
            for name in ("triton", "xformers", "flash3")
        ),
        ("flash3", {"gpu": Gpu((10, 0), 148)}, "a GPU of compute capability 10.0"),
        *((name, {"geometry": LATENT}, "latents") for name in ("xformers", "flash3")),
        *((name, {"dtype": torch.float64}, "float64") for name in ("triton", "xformers", "flash3")),
        *((name, {"dtype": torch.float32}, "float32") for name in ("xformers", "flash3")),
        ("triton", {"geometry": WIDE}, "heads of up to 256 numbers, not 512"),
        ("triton", {"geometry": latent_geometry(576)}, "latents of up to 576 numbers, not 640"),
        ("triton", {"geometry": latent_geometry(512, 320)}, "up to 256 numbers, not 320"),
        *(
            (name, {"geometry": UNEQUAL}, "keys of 64 and values of 128 numbers")
            for name in ("xformers", "flash3")
        ),
        ("xformers", {"geometry": replace(PLAIN, key_shape=(1, 96), value_shape=(1, 96))}, "96"),
        *((name, {"geometry": SINKS}, "sinks") for name in ("xformers", "flash3")),
        *(("xformers", {"geometry": geometry}, "window nor a soft") for geometry in (WINDOW, CAP)),
        ("xformers", {"block_size": 48}, r"block_size=48 is no multiple of 64"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(name, problem, reason):
    setting = {"gpu": H100, "dtype": HALF, "block_size": 64} | problem
    with pytest.raises(ConfigError, match=rf"attention_backend='{name}': cannot run.*{reason}"):
        choose(name, **setting)


@pytest.mark.parametrize(
    ("name", "package"), [("xformers", "xformers"), ("flash3", "flash_attn_interface")]
)
def test_a_package_that_is_missing_is_named(name, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=rf"'{name}': .* {package}.* cannot be imported \(No "):
        choose(name, dtype=HALF, gpu=H100, block_size=64)


def test_an_xformers_that_would_refuse_every_call_is_refused_with_its_own_reason(monkeypatch):
    """As 0.0.35 beside a torch for CUDA 13: it is imported, warns, and calls itself not built."""
    pytest.importorskip("triton")
    library = ModuleType("xformers._cpp_lib")
    library._cpp_library_load_exception = OSError(
        "it was built for:\n    CUDA 1208 (you have 1300)\n  Please reinstall xformers"
    )
    for module in (ModuleType("xformers.ops.fmha"), library):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ConfigError, match=r"not whole \(it was .* CUDA 1208 \(you have 1300\)\)"):
        choose("xformers", dtype=HALF, gpu=H100, block_size=64)


def test_auto_prefers_our_own_kernels_on_a_gpu_and_tells_why_where_they_cannot_run():
    pytest.importorskip("triton")
    for geometry in (PLAIN, WINDOW, CAP, SINKS, UNEQUAL, LATENT):
        backend = choose("auto", geometry, HALF, H100)
        assert backend.description == "Triton kernels"
        assert backend.is_graph_safe
    backend = choose("auto", WIDE, HALF, H100)
    assert backend.description == (
        "torch, slower than the Triton kernels, because it takes heads of up to 256 numbers, not "
        "512"
    )
    assert not backend.is_graph_safe
