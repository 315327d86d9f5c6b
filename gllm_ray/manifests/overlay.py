"""A directory of kustomize: what it builds, and what is made of its configuration."""

import shutil
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

from gllm_ray.errors import ConfigError
from gllm_ray.serve_file import load_serve_file
from gllm_ray.strict_yaml import parse_documents, read_documents, read_yaml

CONFIG_ANNOTATION = "gllm-ray/config"
RENDER = "gllm-ray manifests render"
_BUILD_TIMEOUT_S = 60


class Overlay:
    """A directory with a `kustomization.yaml`.

    Its annotation `gllm-ray/config` names the file of Ray Serve, relative to the directory, that
    `serve-config.yaml` there embeds. `rendered.yaml` is what kustomize builds of it all, to read
    and for machines without kubectl.

    Args:
        directory: Where it lies.

    Raises:
        ConfigError: It has no `kustomization.yaml`, or one that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rendered = directory / "rendered.yaml"
        self.serve_patch = directory / "serve-config.yaml"
        kustomization: Any = read_yaml(directory / "kustomization.yaml")
        if not isinstance(kustomization, dict):
            raise ConfigError(f"{directory}/kustomization.yaml: must be a mapping")
        annotations = (kustomization.get("metadata") or {}).get("annotations") or {}
        config = annotations.get(CONFIG_ANNOTATION)
        self.config = None if config is None else directory / config

    @property
    def can_build(self) -> bool:
        """Whether kubectl is installed."""
        return shutil.which("kubectl") is not None

    def objects(self) -> list[object]:
        """What is applied to a cluster.

        Raises:
            ConfigError: kubectl refuses to build it; or there is neither kubectl nor a
                `rendered.yaml`.
        """
        if self.can_build:
            return self._built
        if self.rendered.exists():
            return read_documents(self.rendered)
        raise ConfigError(
            f"{self.directory}: cannot be built; install kubectl, or `{RENDER}` where it is"
        )

    def stale_files(self) -> list[Path]:
        """Files that `render` would change; those that need kubectl are left out without it."""
        stale = []
        if self.config is not None and not _holds(self.serve_patch, self._serve_patch()):
            stale.append(self.serve_patch)
        has_both = self.can_build and self.rendered.exists()
        if has_both and read_documents(self.rendered) != self._built:
            stale.append(self.rendered)
        return stale

    def render(self) -> list[Path]:
        """Write `serve-config.yaml` and, with kubectl, `rendered.yaml`; returns those written.

        Raises:
            ConfigError: The configuration has mistakes, or kubectl refuses to build.
        """
        written = []
        if self.config is not None:
            self.serve_patch.write_text(self._serve_patch(), encoding="utf-8")
            written.append(self.serve_patch)
        if self.can_build:
            self.rendered.write_text(self._build(), encoding="utf-8")
            written.append(self.rendered)
        return written

    @cached_property
    def _built(self) -> list[object]:
        return parse_documents(self._build(), self.directory)

    def _serve_patch(self) -> str:
        assert self.config is not None
        load_serve_file(self.config)
        text = self.config.read_text(encoding="utf-8")
        lines = "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())
        return (
            f"# Made by `{RENDER}`: change {self.config.name} instead.\n"
            f"- op: add\n  path: /spec/serveConfigV2\n  value: |\n{lines}"
        )

    def _build(self) -> str:
        try:
            result = subprocess.run(
                ["kubectl", "kustomize", str(self.directory)],
                capture_output=True,
                text=True,
                timeout=_BUILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"{self.directory}: kubectl kustomize takes longer than {_BUILD_TIMEOUT_S} s; can "
                "it reach all that the overlay refers to?"
            ) from None
        if result.returncode:
            reason = " ".join(result.stderr.split())
            raise ConfigError(f"{self.directory}: kubectl kustomize: {reason}")
        return f"# Made by `{RENDER}`.\n" + result.stdout


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
