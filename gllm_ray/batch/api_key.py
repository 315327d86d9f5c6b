"""The API key that is shown to a service."""

import os

from gllm_ray.errors import ConfigError

API_KEY_VARIABLE = "OPENAI_API_KEY"  # as OpenAI's client has it


def key_headers(variable: str | None = None) -> dict[str, str]:
    """The headers that show a key, which comes from the environment: logs tell options.

    Args:
        variable: Where it must be; None: where OpenAI's client looks, if there is one.

    Raises:
        ConfigError: It is not there, or has what no HTTP header may have.
    """
    name = variable or API_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if not key:
        if variable is not None:
            raise ConfigError(f"--api-key-env={name}: there is no such variable, or it is empty")
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{name}: has characters that no HTTP header may have")
    return {"Authorization": f"Bearer {key}"}
