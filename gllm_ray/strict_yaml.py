"""YAML files, strictly: no key twice, and a line number for each mistake."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from gllm_ray.errors import ConfigError

# Kinds of our files by a key that others do not have, and what takes them.
_KINDS = {
    "applications": ("a configuration of Ray Serve", "`gllm-ray serve`"),
    "hardware": ("a simulation", "`gllm-ray simulate`"),
    "gpus": ("a plan", "`gllm-ray plan`"),
}


def read_yaml(path: Path) -> object:
    """What a file holds.

    Raises:
        ConfigError: It cannot be read, or its text is not YAML: `demo.yaml:7: ...`.
    """
    with _mistakes_of(path):
        return yaml.load(path.read_bytes(), Loader=_StrictLoader)


def read_documents(path: Path) -> list[object]:
    """What each document of a file holds, empty ones left out; see `read_yaml`."""
    with _mistakes_of(path):
        return parse_documents(path.read_bytes(), path)


def parse_documents(text: str | bytes, source: object) -> list[object]:
    """What each document of a text holds, empty ones left out.

    Args:
        text: YAML.
        source: Where it is from, for messages.

    Raises:
        ConfigError: The text is not YAML: `<source>:7: ...`.
    """
    with _mistakes_of(source):
        documents = yaml.load_all(text, Loader=_StrictLoader)
        return [document for document in documents if document is not None]


def refuse_other_kind(path: Path, data: object, key: str) -> None:
    """Return unless a file is plainly one of another kind than a command takes.

    Args:
        path: The file.
        data: What it holds.
        key: That all files of the kind have.

    Raises:
        ConfigError: It has the key of another kind instead; says which command takes that.
    """
    if not isinstance(data, dict) or key in data:
        return
    for other, (kind, command) in _KINDS.items():
        if other in data:
            raise ConfigError(
                f"{path}: is {kind}, for {command}; must be {_KINDS[key][0]}, with the key {key}"
            )


@contextlib.contextmanager
def _mistakes_of(source: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = ": ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{source}:{line}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: must be UTF-8: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


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
