"""Custom resource definitions as the API server applies them, and stricter: no key is dropped."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celpy
import yaml
from celpy.adapter import json_to_cel
from jsonschema import Draft7Validator

from gllm_ray.errors import ConfigError
from gllm_ray.manifests.schema_errors import describe_errors, key_path

JsonSchema = dict[str, Any]

_KEEPS_UNKNOWN = "x-kubernetes-preserve-unknown-fields"
_RULES = "x-kubernetes-validations"


class CustomResources:
    """The definitions in a folder, in files named as controller-gen names them.

    Args:
        folder: Has files such as `ray.io_rayservices.yaml`.

    Raises:
        ConfigError: It has none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not any(folder.glob("*_*.yaml")):
            raise ConfigError(f"{folder}: must hold definitions such as ray.io_rayservices.yaml")
        self._schemas: dict[tuple[str, str], JsonSchema | None] = {}

    def schema(self, api_version: str, kind: str) -> JsonSchema | None:
        """The strict schema of a kind; None if the folder does not define its group.

        Raises:
            ConfigError: The folder defines the group, but not the kind or this version of it; or
                the file of the kind is no definition.
        """
        key = (api_version, kind)
        if key not in self._schemas:
            self._schemas[key] = self._read(*key)
        return self._schemas[key]

    def find_mistakes(self, item: dict[str, Any]) -> list[str] | None:
        """One line for each mistake in an object; None if its group is not defined here."""
        try:
            schema = self.schema(item["apiVersion"], item["kind"])
        except ConfigError as error:
            return [str(error)]
        if schema is None:
            return None
        item = _without_nulls(item)
        lines = describe_errors(Draft7Validator(schema).iter_errors(item))
        return lines + list(_broken_rules(schema, item, ()))

    def _read(self, api_version: str, kind: str) -> JsonSchema | None:
        group, _, version = api_version.rpartition("/")
        path = self._folder / f"{group}_{kind.lower()}s.yaml"
        if not path.is_file():
            if any(self._folder.glob(f"{group}_*.yaml")):
                raise ConfigError(f"kind={kind!r}: is none of {api_version}")
            return None
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte, so the fast one
        try:
            definition = yaml.load(path.read_bytes(), Loader=loader)
            versions = {item["name"]: item for item in definition["spec"]["versions"]}
        except (yaml.YAMLError, LookupError, TypeError):
            raise ConfigError(f"{path}: must be a custom resource definition") from None
        if version not in versions or versions[version].get("deprecated"):
            good = [name for name, item in versions.items() if not item.get("deprecated")]
            raise ConfigError(f"apiVersion={api_version!r}: must be {group}/{' or '.join(good)}")
        schema: JsonSchema = _strict(versions[version]["schema"]["openAPIV3Schema"])
        return schema


def _strict(node: Any) -> Any:  # noqa: ANN401
    """Refuse each key that the API server would drop."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _strict(child) for key, child in node.items()}
    # A mapping of keys may be called `properties` itself; then it has no type.
    is_object = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if is_object and not node.get(_KEEPS_UNKNOWN):
        node.setdefault("additionalProperties", False)
    return node


def _without_nulls(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_without_nulls(child) for child in value]
    return value


def _broken_rules(schema: JsonSchema, value: Any, path: tuple[str | int, ...]) -> Iterator[str]:  # noqa: ANN401
    """Rules in the Common Expression Language that a value breaks, but for those of changes."""
    for rule in schema.get(_RULES, ()):
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"])(value):
            yield f"{key_path(path)}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        other = schema.get("additionalProperties")
        for key, child in value.items():
            node = schema.get("properties", {}).get(key, other)
            if isinstance(node, dict):
                yield from _broken_rules(node, child, (*path, key))
    elif isinstance(value, list) and "items" in schema:
        for i, child in enumerate(value):
            yield from _broken_rules(schema["items"], child, (*path, i))


@functools.cache
def _program(rule: str) -> Callable[[Any], bool]:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return lambda value: bool(program.evaluate({"self": json_to_cel(value)}))
