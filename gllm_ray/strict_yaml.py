"""YAML files, strictly: no key twice, and a line number for each mistake."""

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from gllm_ray.errors import ConfigError


def read_yaml(path: Path) -> object:
    """What a file holds.

    Raises:
        ConfigError: It cannot be read, or its text is not YAML: `demo.yaml:7: ...`.
    """
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
