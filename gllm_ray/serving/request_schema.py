"""What every part of a request's body has in common: nothing unknown, nothing coerced."""

import re
from collections.abc import Iterable
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_KEYS = 128

Schema = TypeVar("Schema", bound=BaseModel)


class RequestSchema(BaseModel):
    """A JSON object of a body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_num_keys(cls, data: object) -> object:
        """Each unknown key is a mistake to describe, and a body has room for a million."""
        return _refuse_more_keys(data, _MAX_KEYS)


def at_most(limit: int) -> BeforeValidator:
    """Bound the keys of an object before each of them is looked at."""
    return BeforeValidator(lambda value: _refuse_more_keys(value, limit))


def _refuse_more_keys(value: object, limit: int) -> object:
    if isinstance(value, dict) and len(value) > limit:
        raise PydanticCustomError(
            "too_many_keys",
            "must have at most {limit} keys, not {num_keys}",
            {"limit": limit, "num_keys": len(value)},
        )
    return value


def only(*neutral: object, instead: str = "") -> AfterValidator:
    """Accept null and the values that ask for nothing; `instead` is what asks for the same."""
    return AfterValidator(lambda value: refuse_unless(value, neutral, instead))


def refuse_unless(value: object, neutral: Iterable[object], instead: str = "") -> object:
    """See `only`."""
    # `True == 1`, so the types are compared, too.
    is_neutral = any(
        value == item and isinstance(value, bool) is isinstance(item, bool) for item in neutral
    )
    if value is not None and not is_neutral:
        what_to_do = f"use {instead}" if instead else "leave it out"
        raise PydanticCustomError(
            "unsupported_parameter", "is not supported; {what_to_do}", {"what_to_do": what_to_do}
        )
    return value


def is_text(value: object) -> bool:
    """Whether it is text that UTF-8 can spell."""
    # JSON can spell half of a surrogate pair, which is no character.
    return isinstance(value, str) and not _SURROGATE.search(value)


def check_text(value: str) -> str:
    """Refuse what UTF-8 cannot spell; a validator of pydantic."""
    if not is_text(value):
        raise PydanticCustomError("not_unicode", "must be valid Unicode")
    return value


def parse_schema(schema: type[Schema], data: object, *path: str | int) -> Schema:
    """Validate data as a route does its body, or what is at a path of it.

    Raises:
        RequestValidationError: It is none; the table of HTTP errors has the words for it.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(
            [{**item, "loc": ("body", *path, *item["loc"])} for item in error.errors()]
        ) from None
