"""Strict schemas: every key known, nothing coerced, and one line for each mistake.

What a key allows is told from the model's JSON schema, so that the check, the message about a
mistake and the table of keys in the documentation cannot disagree.
"""

import difflib
import functools
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gllm_ray.errors import ConfigError

JsonSchema = dict[str, Any]
ModelT = TypeVar("ModelT", bound=BaseModel)

_SECRET = re.compile(
    r"\benv_vars\b|(token|secret|passw(or)?d|credentials?|[_-]key|apikey)$", re.IGNORECASE
)
_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class StrictModel(BaseModel):
    """A mapping in a configuration file.

    A field may say in `json_schema_extra={"allowed": ...}` what it allows, where its type and its
    range do not tell. A validator of the whole model words its mistake as `key=value: must ...`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def find_mistakes(model: type[BaseModel], data: object, prefix: str = "") -> list[str]:
    """Validate `data`, and describe each mistake in one line: `key=value: what is allowed`.

    Args:
        model: The schema.
        data: What a file holds, or a part of it.
        prefix: The key under which the file holds `data`.
    """
    try:
        model.model_validate(data)
    except ValidationError as error:
        schema = _inlined_schema(model)
        lines = [_describe(dict(item), data, schema, prefix) for item in error.errors()]
        return list(dict.fromkeys(lines))  # Each member of a union complains for itself.
    return []


def parse_strictly(model: type[ModelT], data: object) -> ModelT:
    """The value that `data` stands for.

    Raises:
        ConfigError: One line for each mistake, naming the key, the value and what is allowed.
    """
    if mistakes := find_mistakes(model, data):
        raise ConfigError("\n".join(mistakes))
    return model.model_validate(data)


def key_table(model: type[BaseModel]) -> str:
    """Every key of a schema with its default and what it allows, as a Markdown table."""
    rows = ["| Key | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for path, owner, node in _keys(_inlined_schema(model)):
        if not _properties(node):
            key = f"`{path}`{owner}"
            default = f"`{json.dumps(node['default'])}`" if "default" in node else "required"
            rows.append(f"| {key} | {default} | {allowed_words(node)} | {node['description']} |")
    return "\n".join(rows)


def _describe(item: dict[str, Any], data: object, schema: JsonSchema, prefix: str) -> str:
    path, key, parent, node = prefix, "", schema, schema
    value: Any = data
    loc = item["loc"]
    if item["type"] == "union_tag_invalid":
        loc += (item["ctx"]["discriminator"].strip("'"),)
    for part in loc:
        if part in _members(node):
            node = _members(node)[part]
            continue
        is_item = isinstance(value, list) and isinstance(part, int)
        is_present = is_item or (isinstance(value, dict) and part in value)
        if not is_present and item["type"] != "missing":
            break  # Not a key, but the member of a union that was tried.
        key = str(part) if re.fullmatch(r"[\w.-]{1,60}", str(part)) else spell_value(part)
        path += f"[{key}]" if is_item else f".{key}"
        parent, node = node, _child(node, part)
        value = value[part] if is_present else None
    path = path.removeprefix(".")
    if item["type"] == "missing":
        return f"{path}: required, but not given; must be {allowed_words(node)}"
    if item["type"] == "value_error" and isinstance(value, dict):
        return f"{path}.{item['ctx']['error']}".removeprefix(".")
    given = "<hidden>" if _SECRET.search(path) else spell_value(value)
    if path:
        given = f"{path}={given}"
    if item["type"] in {"extra_forbidden", "invalid_key"}:
        return f"{given}: unknown key; {_suggest(key, parent, schema, prefix)}"
    finite = "finite: " if item["type"] == "finite_number" else ""
    return f"{given}: must be {finite}{allowed_words(node)}"


def _suggest(key: str, parent: JsonSchema, schema: JsonSchema, prefix: str) -> str:
    for path, owner, _ in _keys(schema):
        if path.rpartition(".")[2] == key:
            return f"did you mean {f'{prefix}.{path}'.removeprefix('.')}{owner}?"
    return suggest_key(key, list(_properties(parent)))


def suggest_key(key: str, known: Sequence[str]) -> str:
    """What may have been meant by an unknown key."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


def spell_value(value: object) -> str:
    """A value as YAML spells it, for a message: bounded, and silent about what a mapping holds."""
    return _Echo().repr(value)


class _Echo(reprlib.Repr):
    """See `spell_value`."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_NoneType(self, _value: None, _level: int) -> str:  # noqa: N802
        return "null"

    def repr_bool(self, value: bool, _level: int) -> str:
        return str(value).lower()

    def repr_dict(self, value: dict[Any, Any], _level: int) -> str:
        return "{...}" if value else "{}"


@functools.cache
def _inlined_schema(model: type[BaseModel]) -> JsonSchema:
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:  # noqa: ANN401
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]] | node
        node = {key: inline(child) for key, child in node.items() if key != "$ref"}
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        for member in _members(node).values():
            member["properties"][_tag(node)] |= {"enum": list(_members(node))}
        return node

    inlined: JsonSchema = inline(schema)
    return inlined


def allowed_words(node: JsonSchema) -> str:
    """What a node of a JSON schema allows, in words that go on after `must be`."""
    if "allowed" in node:
        return str(node["allowed"])
    if members := _members(node):
        return f"{_choice(list(members))}, or a mapping with that {_tag(node)}"
    if "anyOf" in node:
        return ", or ".join(allowed_words(branch) for branch in node["anyOf"])
    if "const" in node or "enum" in node:
        return _choice([str(choice) for choice in node.get("enum", [node.get("const")])])
    words = _TYPES.get(node.get("type", ""), "any value") + _range(node)
    if node.get("minLength"):
        words += " that is not empty"
    if node.get("items"):
        words += f", each item {allowed_words(node['items'])}"
    return words


def _choice(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _range(node: JsonSchema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    limits = [f"{words} {node[limit]}" for limit, words in _LIMITS.items() if limit in node]
    return " " + " and ".join(limits) if limits else ""


def _branches(node: JsonSchema) -> list[JsonSchema]:
    return (
        [leaf for branch in node["anyOf"] for leaf in _branches(branch)]
        if "anyOf" in node
        else [node]
    )


def _tag(node: JsonSchema) -> str:
    """The key that tells the members of a tagged union apart."""
    return str(node["discriminator"]["propertyName"])


def _members(node: JsonSchema) -> dict[str, JsonSchema]:
    """The members of a tagged union under their tags; empty if the node is none."""
    if "discriminator" not in node:
        return {}
    return {branch["properties"][_tag(node)]["const"]: branch for branch in node["anyOf"]}


def _properties(node: JsonSchema) -> dict[str, JsonSchema]:
    return {
        key: child
        for branch in _branches(node)
        for key, child in branch.get("properties", {}).items()
    }


def _child(node: JsonSchema, part: str | int) -> JsonSchema:
    """The node of a key, of a list's item, or of a mapping's value; empty if there is none."""
    children: list[Any] = [_properties(node).get(str(part))]
    for branch in _branches(node):
        children += [branch.get("items"), branch.get("additionalProperties")]
    return next((child for child in children if isinstance(child, dict)), {})


def _keys(node: JsonSchema, path: str = "") -> Iterator[tuple[str, str, JsonSchema]]:
    """Every key, depth first: its dotted path, ` of <member>` in a tagged union, its node."""
    owners = {id(member): f" of {tag}" for tag, member in _members(node).items()}
    holders = [("", branch) for branch in _branches(node)]
    holders += [("[]", branch["items"]) for branch in _branches(node) if "items" in branch]
    for index, (suffix, holder) in enumerate(holders):
        for key, child in _properties(holder).items():
            is_tag = bool(owners) and key == _tag(node)
            if is_tag and index > 0:
                continue  # The members share it.
            child_path = f"{path}{suffix}.{key}".removeprefix(".")
            yield child_path, "" if is_tag else owners.get(id(holder), ""), child
            yield from _keys(child, child_path)
