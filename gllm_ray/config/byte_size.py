"""Sizes in bytes, as numbers or as text with a unit."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

BYTES = "a positive number of bytes or text such as 512MiB"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _parse_bytes(value: object) -> object:
    """Turn `"4GiB"` into bytes; leave anything else for the type check."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?(\w+)", value)):
        return int(float(match[1]) * _UNITS.get(match[2], 0))
    return value


ByteSize = Annotated[
    int,
    BeforeValidator(_parse_bytes),
    Field(ge=1, json_schema_extra={"allowed": BYTES}),
]
