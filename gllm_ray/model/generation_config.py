"""How a model's maker advises to sample: what generation_config.json says about it."""

import logging
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from gllm_ray.errors import ConfigError
from gllm_ray.strict_schema import StrictModel, parse_strictly

logger = logging.getLogger(__name__)

# Flat for any model; far below what would let a token come that is ruled out.
MAX_TEMPERATURE = 100


class SamplingDefaults(StrictModel):
    """The values of requests that leave a parameter out; OpenAI's, where nothing else is said."""

    temperature: float = Field(default=1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)

    @classmethod
    def of(cls, generation_config: Mapping[str, Any]) -> Self:
        """Those of a generation_config.json; logs what holds.

        As vLLM has it, `do_sample` does not matter.

        Raises:
            ConfigError: A value cannot be.
        """
        said = {name: generation_config.get(name) for name in cls.model_fields}
        try:
            defaults = parse_strictly(
                cls, {name: value for name, value in said.items() if value is not None}
            )
        except ConfigError as error:
            raise ConfigError(
                f"generation_config.json: {error}; ignore it by model.generation_config: none"
            ) from error
        logger.info("requests sample with %s where they do not say how", defaults)
        return defaults
