"""Fitted constants that come with the package: one JSON file each for devices, links and hosts."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import TypeVar

from pydantic import Field

from gllm_ray.errors import ConfigError
from gllm_ray.strict_schema import StrictModel


class Calibration(StrictModel):
    """What is known of one device, link or host."""

    name: str = Field(min_length=1, description="What configurations call it.")
    is_calibrated: bool = Field(description="Whether the constants were fitted to measurements.")
    provenance: str = Field(
        min_length=1,
        description="Where the constants come from: data, licence and error of the fit, or whose "
        "nominal values and efficiencies they are.",
    )


CalibrationT = TypeVar("CalibrationT", bound=Calibration)


def read_calibrations(file: str, model: type[CalibrationT]) -> Mapping[str, CalibrationT]:
    """The entries of a file of this folder, under their names."""
    entries = json.loads(files(__name__).joinpath(file).read_text(encoding="utf-8"))
    return {entry["name"]: model.model_validate(entry) for entry in entries}


def find_calibration(key: str, name: str, known: Mapping[str, CalibrationT]) -> CalibrationT:
    """The entry of a name.

    Args:
        key: Where the name was given, for the message.
        name: The name.
        known: All entries.

    Raises:
        ConfigError: There is no such entry.
    """
    if name not in known:
        raise ConfigError(f"{key}={name!r}: not known; must be one of {', '.join(known)}")
    return known[name]
