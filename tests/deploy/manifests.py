"""What the tests of deploy/ share: where things lie, and the checks that can be had here."""

import functools
import os
import shutil
from pathlib import Path

import pytest

from gllm_ray.manifests.command import CRD_VARIABLE, load_checks

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted((DEPLOY / "overlays").iterdir())
OTHERS = [DEPLOY / "raycluster", DEPLOY / "rayjob" / "batch", DEPLOY / "rayjob" / "bench"]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing")


def crd_dir():
    """KubeRay's definitions: from the environment, or beside the repository; or the test skips."""
    beside = ROOT.parent / "shared" / "data" / "kuberay-crds"
    place = Path(os.environ.get(CRD_VARIABLE, beside))
    if not place.is_dir():
        pytest.skip(f"KubeRay's definitions are missing; {CRD_VARIABLE} may name their folder")
    return place


@functools.cache
def full_checks():
    """Our rules, KubeRay's definitions and Kubernetes' own schemas; or the test skips."""
    for module in ("kubernetes_validate", "celpy"):
        pytest.importorskip(module, reason="gllm_ray[deploy] is not installed")
    return load_checks(crd_dir())
