"""Read and check the file that `serve run` takes, our `args` in it included.

Nothing is started, imported or downloaded: no Ray, no weights, no GPU.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gllm_ray.config import (
    FRONT_END_NAME,
    ModelsConfig,
    ServiceConfig,
    args_schema,
    deployment_name,
)
from gllm_ray.errors import ConfigError
from gllm_ray.serve_schema import Application, ServeFile
from gllm_ray.strict_schema import find_mistakes
from gllm_ray.strict_yaml import read_yaml, refuse_other_kind

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
    data = read_yaml(path)
    refuse_other_kind(path, data, "applications")
    if mistakes := find_serve_mistakes(data):
        raise ConfigError("\n".join(f"{path}: {line}" for line in mistakes))
    return ServeFile.model_validate(data)


def find_serve_mistakes(data: object) -> list[str]:
    """Check every key of what a file of Ray Serve holds; one line for each mistake."""
    mistakes = find_mistakes(ServeFile, data)
    for key, application in _our_applications(data):
        args = application.get("args", {})
        mistakes += find_mistakes(args_schema(args), args, f"{key}.args")
        mistakes += _find_override_mistakes(application, key)
    return list(dict.fromkeys(mistakes))  # A mistake about `args` itself is one to both schemas.


def load_only_service(path: Path) -> ServiceConfig:
    """Read a configuration file of Ray Serve that has one application of ours.

    Raises:
        ConfigError: The file has mistakes, or has none or several of them.
    """
    configs = [
        config
        for application in load_serve_file(path).applications
        for config in services_of(application).values()
    ]
    if len(configs) != 1:
        raise ConfigError(f"{path}: has {len(configs)} models of {IMPORT_PATH}; must have one")
    return configs[0]


def app_config(application: Application) -> ServiceConfig | ModelsConfig | None:
    """The checked `args` of an application; None if it is not one of ours."""
    if not _is_ours(application.import_path):
        return None
    return args_schema(application.args).model_validate(application.args)


def services_of(application: Application) -> dict[str, ServiceConfig]:
    """The deployments of an application that have pipelines; none if it is not one of ours."""
    match app_config(application):
        case None:
            return {}
        case ModelsConfig(models=models):
            return {deployment_name(config): config for config in models}
        case config:
            return {DEPLOYMENT_NAME: config}


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
    deployments, names = application.get("deployments"), _deployment_names(application)
    for i, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        options = deployment if isinstance(deployment, dict) else {}
        if names and options.get("name", names[0]) not in names:
            allowed = " or ".join(names)
            yield f"{key}.deployments[{i}].name={options['name']!r}: must be {allowed}"
        for option in _FROM_PIPELINE:
            if option in options:
                yield f"{key}.deployments[{i}].{option}: must be left out; see {key}.args.pipeline"


def _deployment_names(application: dict[str, Any]) -> list[str]:
    """The deployments of our application; none if its `args` do not tell them."""
    args = application.get("args", {})
    if args_schema(args) is ServiceConfig:
        return [DEPLOYMENT_NAME]
    if find_mistakes(ModelsConfig, args):
        return []
    models = ModelsConfig.model_validate(args).models
    return [FRONT_END_NAME, *map(deployment_name, models)]
