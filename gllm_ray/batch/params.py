"""More of a request's body, given on the command line."""

import json
from collections.abc import Iterable
from typing import Any

from gllm_ray.errors import ConfigError


def parse_params(text: str, *, ours: Iterable[str]) -> dict[str, Any]:
    """The value of `--params`.

    Args:
        text: JSON.
        ours: Keys of the body that the command sets.

    Raises:
        ConfigError: It is no JSON object, or has a key that the command sets.
    """
    try:
        params = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--params={text}: is no JSON: {error}") from error
    if not isinstance(params, dict):
        raise ConfigError(f'--params={text}: must be a JSON object such as {{"max_tokens": 64}}')
    for name in ours:
        if name in params:
            raise ConfigError(f"--params: {name} must be left out, for the command sets it")
    return params
