"""The Triton kernels compile for GPUs that need not be here, and fit into their shared memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("capability", "max_kib"),
    [
        pytest.param(89, 99, id="L40S"),
        pytest.param(90, 227, id="H100", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit_into_shared_memory(capability, max_kib, tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.triton_compilation", str(capability)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    # For each case decodes and chunks; contexts within a short window are in one part.
    launched = Counter(kernel["kernel"] for kernel in kernels)
    assert launched == {"attend": 16, "combine": 7, "write": 8}
    for kernel in kernels:
        assert kernel["binary_bytes"] > 0
        assert kernel["shared_bytes"] <= 1024 * max_kib, kernel
