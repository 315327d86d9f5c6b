"""What a JSON schema has against a value, in the words of `strict_schema`."""

from collections.abc import Iterable, Iterator
from typing import Any

from jsonschema.exceptions import ValidationError

from gllm_ray.strict_schema import allowed_words, spell_value, suggest_key


def key_path(parts: Iterable[str | int], prefix: str = "") -> str:
    """A path such as `spec.workerGroupSpecs[0].replicas`."""
    path = prefix
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def describe_errors(errors: Iterable[ValidationError], prefix: str = "") -> list[str]:
    """One line for each mistake: `key=value: what is allowed`."""
    return [line for error in errors for line in _describe(error, prefix)]


def _describe(error: ValidationError, prefix: str) -> Iterator[str]:
    path = key_path(error.absolute_path, prefix)
    schema: dict[str, Any] = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = list(schema.get("properties", {}))
        for key in sorted(set(instance) - set(known)):
            place = f"{path}.{key}".removeprefix(".")
            yield f"{place}={spell_value(instance[key])}: unknown key; {suggest_key(key, known)}"
    elif error.validator == "required":
        for key in sorted(set(schema["required"]) - set(instance)):
            yield f"{path}.{key}: required, but not given".removeprefix(".")
    elif error.validator == "anyOf" and {"type": "null"} in schema["anyOf"] and error.context:
        yield from describe_errors(_of_the_only_branch(error), prefix)
    else:
        words = allowed_words(schema)
        if error.validator == "pattern":
            words = f"text that matches {schema['pattern']}"
        yield f"{path}={spell_value(instance)}: must be {words}"


def _of_the_only_branch(error: ValidationError) -> list[ValidationError]:
    """The errors of a value that may be null, and is none: those of what else it may be."""
    return [child for child in error.context or () if child.validator_value != "null"]
