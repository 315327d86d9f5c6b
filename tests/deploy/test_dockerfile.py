"""The Dockerfile, as far as it can be read: images cannot be built where there is no Docker."""

import re
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
IMAGE = re.compile(r"registry\.example\.com/gllm-ray:(?P<version>[\d.]+)-(?P<target>\w+)")


def instructions():
    """Each instruction with its arguments, in order, continued lines joined."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    return [(name, " ".join(arguments.split())) for name, arguments in lines]


def stages():
    """The instructions of each stage by its name, those of the stage that it begins with first."""
    found = {}
    for name, arguments in instructions():
        if name == "FROM":
            parent, stage = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()
            found[stage] = current = list(found.get(parent, [("FROM", parent)]))
        elif found:
            current.append((name, arguments))
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_ends_as_a_user_without_rights(target):
    users = [arguments for name, arguments in stages()[target] if name == "USER"]
    assert users[-1] == "1000:1000"


def test_the_base_image_is_one_version_and_every_copied_stage_exists():
    arguments = dict(pair.split("=", 1) for name, pair in instructions() if name == "ARG")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", arguments["PYTHON"])
    assert {found[0][1] for found in stages().values()} == {"${PYTHON}"}
    copied = re.findall(r"--from=(\S+)", DOCKERFILE.read_text(encoding="utf-8"))
    assert set(copied) == {"build-cpu", "build-cuda"} <= set(stages())


def test_everything_that_pip_installs_is_constrained():
    installs = [arguments for name, arguments in instructions() if "pip install" in arguments]
    assert len(installs) == 3
    assert all("-c constraints.txt" in arguments for arguments in installs)


def test_an_index_of_torchs_own_comes_with_that_of_all_that_torch_needs():
    installs = [arguments for name, arguments in instructions() if "--index-url" in arguments]
    assert installs
    assert all("--extra-index-url https://pypi.org/simple" in line for line in installs)


def test_everything_that_is_copied_exists_and_reaches_the_build():
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    kept = [Path(line[1:]) for line in ignored.splitlines() if line.startswith("!")]
    assert ignored.startswith("*\n")
    for name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            for source in map(Path, sources):
                assert (ROOT / source).exists()
                assert any(source == place or place in source.parents for place in kept)


def test_every_manifest_names_an_image_that_the_dockerfile_makes():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    images = {
        match.groupdict()["target"]: match.groupdict()["version"]
        for path in DEPLOY.rglob("rendered.yaml")
        for match in IMAGE.finditer(path.read_text(encoding="utf-8"))
    }
    assert images == dict.fromkeys(("cpu", "cuda"), version.group(1))


def test_rays_version_is_that_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^ray==(.+)$", constraints, re.M)
    said = {
        value
        for path in DEPLOY.rglob("*.yaml")
        for value in re.findall(r"rayVersion: (\S+)", path.read_text(encoding="utf-8"))
    }
    assert said == {version}
