"""Profiles of real hardware, which lie beside a checkout where they are at hand at all."""

import csv
from pathlib import Path

import pytest

PROFILES = Path(__file__).parents[3].parent / "shared/data/profiles"


def profile_path(name):
    path = PROFILES / name
    if not path.is_file():
        pytest.skip(f"the profile {name} is not beside this checkout")
    return path


def profile_rows(name):
    with profile_path(name).open(newline="") as lines:
        return list(csv.DictReader(lines))
