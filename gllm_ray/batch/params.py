"""More of a request's body, given on the command line."""

import json
from typing import Any

from gllm_ray.errors import ConfigError


def parse_params(text: str) -> dict[str, Any]:
    """The value of `--params`.

    Raises:
        ConfigError: It is no JSON object.
    """
    try:
        params = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--params={text}: is no JSON: {error}") from error
    if not isinstance(params, dict):
        raise ConfigError(f'--params={text}: must be a JSON object such as {{"max_tokens": 64}}')
    return params
