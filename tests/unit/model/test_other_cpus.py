"""The operators as other CPUs have them compute what torch computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gllm_ray.model.operators import build
from gllm_ray.model.operators.build import OperatorsUnavailableError

ROOT = Path(__file__).parents[3]
TESTS = ("attention_operator", "linear", "fusion")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("cpu", "features"),
    [
        ("x86-64-v3", {"avx2", "fma", "bmi2"}),
        ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),  # no bfloat16
    ],
)
def test_operators_built_for_another_cpu_obey_the_same_laws(cpu, features, tmp_path):
    if not features <= set(build.cpu_description().split()):
        pytest.skip(f"this CPU cannot run what is built for {cpu}")
    try:
        compiler = build._find_compiler()
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))
    known = subprocess.run([*compiler, f"-march={cpu}", "-E", "-x", "c++", os.devnull], check=False)
    if known.returncode:
        pytest.skip(f"{' '.join(compiler)} does not know {cpu}")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {" ".join(compiler)} "$@" -march={cpu}\n')  # the last wins
    script.chmod(0o755)
    # Not the one test that asks what this CPU itself has.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not in_pairs"]
    result = subprocess.run(
        [*command, *(f"tests/unit/model/test_{name}.py" for name in TESTS)],
        cwd=ROOT,
        env={**os.environ, "CXX": str(script), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout
