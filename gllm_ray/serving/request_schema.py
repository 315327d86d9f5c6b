"""What every part of a request's body has in common: nothing unknown, nothing coerced."""

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_MAX_KEYS = 128


class RequestSchema(BaseModel):
    """A JSON object of a body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_num_keys(cls, data: object) -> object:
        """Each unknown key is a mistake to describe, and a body has room for a million."""
        if isinstance(data, dict) and len(data) > _MAX_KEYS:
            raise PydanticCustomError("too_many_keys", f"must have at most {_MAX_KEYS} keys")
        return data
