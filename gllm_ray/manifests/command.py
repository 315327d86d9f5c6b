"""`gllm-ray validate` of manifests, and `gllm-ray manifests`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from gllm_ray.errors import ConfigError
from gllm_ray.manifests.object_checks import OUR_KINDS, Checks, find_our_mistakes, object_name
from gllm_ray.manifests.overlay import RENDER, Overlay
from gllm_ray.strict_yaml import read_documents

CRD_VARIABLE = "KUBERAY_CRD_DIR"
_LACKS_PACKAGES = "pods not checked (pip install gllm_ray[deploy])"
_LACKS_DEFINITIONS = f"without KubeRay's definitions (--crd-dir or {CRD_VARIABLE})"


def add_manifests_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add `manifests` to the commands of a parser."""
    manifests = commands.add_parser("manifests", help="make Kubernetes manifests")
    actions = manifests.add_subparsers(dest="action", required=True)
    render = actions.add_parser(
        "render",
        help="write the configuration into kustomize overlays",
        description="Write the configuration that the annotation `gllm-ray/config` of each "
        "overlay's kustomization.yaml names into its serve-config.yaml, and, with kubectl, what "
        "the overlay builds into its rendered.yaml.",
    )
    render.add_argument("directories", nargs="+", type=Path, metavar="OVERLAY")
    render.set_defaults(run=_render)


def add_crd_option(parser: argparse.ArgumentParser) -> None:
    """Add where the custom resource definitions lie."""
    default = os.environ.get(CRD_VARIABLE)
    parser.add_argument(
        "--crd-dir",
        type=Path,
        default=Path(default) if default else None,
        metavar="DIR",
        help="KubeRay's custom resource definitions, to check manifests against "
        f"(default: ${CRD_VARIABLE}; without it, only our own schemas are)",
    )


def load_checks(crd_dir: Path | None) -> Checks:
    """The checks that this environment has the packages and the definitions for.

    Raises:
        ConfigError: The definitions are asked for, and cannot be read or used.
    """
    try:
        from gllm_ray.manifests.core_kinds import find_core_mistakes, find_pod_mistakes
        from gllm_ray.manifests.custom_resources import CustomResources
    except ModuleNotFoundError as error:
        if crd_dir is not None:
            raise ConfigError(f"{crd_dir}: needs gllm_ray[deploy]; {error}") from None
        return Checks(finders=(find_our_mistakes,), lacking=(_LACKS_PACKAGES, _LACKS_DEFINITIONS))

    def find_mistakes_of_pods(item: dict[str, Any]) -> list[str] | None:
        return list(find_pod_mistakes(item)) if item["kind"] in OUR_KINDS else None

    finders = (find_our_mistakes, find_core_mistakes, find_mistakes_of_pods)
    if crd_dir is None:
        return Checks(finders=finders, lacking=(_LACKS_DEFINITIONS,))
    return Checks(finders=(*finders, CustomResources(crd_dir).find_mistakes))


def is_manifest(path: Path) -> bool:
    """Whether a path is a directory of kustomize, or a file of Kubernetes objects."""
    if path.is_dir():
        return True
    try:
        documents = read_documents(path)
    except ConfigError:
        return False  # the reader of configurations will tell
    return any(isinstance(item, dict) and "kind" in item for item in documents)


def validate_manifests(path: Path, checks: Checks) -> bool:
    """Check an overlay or a file, and print each mistake, or one line with what was checked."""
    try:
        objects, notes = _read(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return False
    found = [(object_name(item), checks.find_object_mistakes(item)) for item in objects]
    mistakes = [f"{path}: {name}: {line}" for name, lines in found for line in lines or ()]
    for line in mistakes:
        print(line, file=sys.stderr)
    if mistakes:
        return False
    if unknown := [name for name, lines in found if lines is None]:
        notes.append(f"not checked: {', '.join(unknown)}")
    count = f"{len(objects)} object" + ("s" if len(objects) != 1 else "")
    print("; ".join([f"OK {path}: {count}", *notes, *checks.lacking]), flush=True)
    return True


def _read(path: Path) -> tuple[list[object], list[str]]:
    """Objects, and what there is to say about how they were got."""
    if not path.is_dir():
        return read_documents(path), []
    overlay = Overlay(path)
    if stale := overlay.stale_files():
        names = " and ".join(file.name for file in stale)
        raise ConfigError(f"{path}: {names}: out of date; run `{RENDER} {path}`")
    notes = [] if overlay.can_build else ["as rendered.yaml has it, for there is no kubectl"]
    return overlay.objects(), notes


def _render(options: argparse.Namespace) -> int:
    try:
        for directory in options.directories:
            overlay = Overlay(directory)
            for path in overlay.render():
                print(f"wrote {path}")
            if not overlay.can_build:
                print(f"left {overlay.rendered} as it is: there is no kubectl", file=sys.stderr)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
