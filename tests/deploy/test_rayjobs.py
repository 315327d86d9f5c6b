"""What the entrypoints of jobs tell KubeRay."""

import os
import shlex
import subprocess

import pytest

from gllm_ray.strict_yaml import read_documents
from tests.deploy.manifests import DEPLOY


@pytest.mark.parametrize(("status", "is_failure"), [(0, False), (2, False), (1, True), (143, True)])
def test_a_batch_fails_unless_all_its_output_is_written(status, is_failure, tmp_path):
    (job,) = read_documents(DEPLOY / "rayjob" / "batch" / "rayjob.yaml")
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "python").chmod(0o755)
    # The submitter's shell takes the words apart, and `ray job submit` joins them for another.
    command = shlex.join(shlex.split(job["spec"]["entrypoint"]))
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, shell=True, check=False, env=environment)
    assert (result.returncode != 0) is is_failure
