"""Read and check the file that `serve run` takes, our `args` in it included.

Nothing is started, imported or downloaded: no Ray, no weights, no GPU.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.serve_schema import Application, ServeFile
from gllm_ray.strict_schema import find_mistakes

IMPORT_PATH = "gllm_ray.serving.app:build_app"
DEPLOYMENT_NAME = "LLMServer"

# The replica's placement group has one bundle a stage, so only `args.pipeline` may shape it.
_FROM_PIPELINE = (
    "placement_group_bundles",
    "placement_group_strategy",
    "placement_group_bundle_label_selector",
    "gang_scheduling_config",
    "max_replicas_per_node",
)


def load_serve_file(path: Path) -> ServeFile:
    """Read a configuration file of Ray Serve, and check every key of it.

    Raises:
        ConfigError: One line for each mistake, such as
            `demo.yaml: applications[0].args.pipeline.num_stages=0: must be an integer from 1 to
            256`, or `demo.yaml:7: ...` where the text is not YAML.
    """
    data = _read_yaml(path)
    mistakes = find_mistakes(ServeFile, data)
    for key, application in _our_applications(data):
        mistakes += find_mistakes(ServiceConfig, application.get("args", {}), f"{key}.args")
        mistakes += _find_override_mistakes(application, key)
    if mistakes:
        # A mistake about `args` itself is one to both schemas.
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(mistakes)))
    return ServeFile.model_validate(data)


def load_only_service(path: Path) -> ServiceConfig:
    """Read a configuration file of Ray Serve that has one application of ours.

    Raises:
        ConfigError: The file has mistakes, or has none or several of them.
    """
    configs = [service_config(application) for application in load_serve_file(path).applications]
    ours = [config for config in configs if config is not None]
    if len(ours) != 1:
        raise ConfigError(f"{path}: has {len(ours)} applications of {IMPORT_PATH}; must have one")
    return ours[0]


def service_config(application: Application) -> ServiceConfig | None:
    """The checked `args` of an application; None if it is not one of ours."""
    if not _is_ours(application.import_path):
        return None
    return ServiceConfig.model_validate(application.args)


def _is_ours(import_path: object) -> bool:
    return re.match(r"gllm_ray[.:]", str(import_path)) is not None


def _our_applications(data: Any) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    applications = data.get("applications") if isinstance(data, dict) else None
    for i, application in enumerate(applications if isinstance(applications, list) else []):
        if isinstance(application, dict) and _is_ours(application.get("import_path")):
            yield f"applications[{i}]", application


def _find_override_mistakes(application: dict[str, Any], key: str) -> Iterator[str]:
    import_path = application["import_path"]
    if import_path.replace(":", ".") != IMPORT_PATH.replace(":", "."):
        yield f"{key}.import_path={import_path!r}: must be {IMPORT_PATH}"
    deployments = application.get("deployments")
    for i, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        options = deployment if isinstance(deployment, dict) else {}
        if options.get("name", DEPLOYMENT_NAME) != DEPLOYMENT_NAME:
            yield f"{key}.deployments[{i}].name={options['name']!r}: must be {DEPLOYMENT_NAME}"
        for option in _FROM_PIPELINE:
            if option in options:
                yield f"{key}.deployments[{i}].{option}: must be left out; see {key}.args.pipeline"


def _read_yaml(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return yaml.load(file, Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = ": ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}:{line}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: must be UTF-8: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once in a mapping, and each error has a line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            key, mark = str(key_node.value)[:60], key_node.start_mark
            if key in first_line:
                reason = f"key {key!r} is given twice, first in line {first_line[key]}"
                raise ComposerError(None, None, reason, mark)
            first_line[key] = mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            reason = f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, reason, node.start_mark) from None
