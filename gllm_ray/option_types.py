"""What options of command lines may be, told before a command does its work."""

import argparse
from math import inf
from pathlib import Path


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, "") or isinstance(default, bool):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """A number of at least 1."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """A number of at least 0."""
    return _integer(text, 0)


def positive_s(text: str) -> float:
    """Seconds, above 0."""
    seconds = _seconds(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number > 0")
    return seconds


def not_negative_s(text: str) -> float:
    """Seconds, 0 or more."""
    seconds = _seconds(text)
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number >= 0")
    return seconds


def output_file(text: str) -> Path:
    """A file that can be written, as is told before a measurement takes its time."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a directory; must be a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its directory must be there")
    return path


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer >= {least}")
    return number


def _seconds(text: str) -> float:
    """A number; -1 if the text is none, or has no end."""
    try:
        seconds = float(text)
    except ValueError:
        return -1.0
    return seconds if seconds < inf else -1.0
