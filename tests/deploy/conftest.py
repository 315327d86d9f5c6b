"""Fixtures of the tests of deploy/."""

import shutil

import pytest

from tests.deploy.manifests import DEPLOY, ROOT


@pytest.fixture
def copy_of_deploy(tmp_path):
    """A copy of deploy/, with configs/ beside it, to change."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path / "deploy"
