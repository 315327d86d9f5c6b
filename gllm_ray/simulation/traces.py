"""Reads recorded requests from a file, one at a time.

A `.csv` has the columns of Vidur's traces (`arrived_at` in seconds, `num_prefill_tokens`,
`num_decode_tokens`) or of Azure's (`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`), and may have
others. A line of a `.jsonl` is an object with the attributes of `SimulatedRequest`.

Dates are counted from the first request, and so are seconds that stand for a date, as those since
1970 do. Other seconds are taken as they are: a trace may begin with a wait.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.length_config import MAX_LENGTH
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.strict_schema import StrictModel, find_mistakes

# The columns of arrival, prompt and output.
_CSV_COLUMNS = (
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
)
_FIRST_DATE_S = 1e8  # three years: seconds from here on stand for a date
_FIELDS = ("arrival_s", "num_prompt_tokens", "num_output_tokens")


class TraceRecord(StrictModel):
    """A row of a trace; see `SimulatedRequest`."""

    arrival_s: float = Field(ge=0)
    num_prompt_tokens: int = Field(ge=1, le=MAX_LENGTH)
    num_output_tokens: int = Field(ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    expected_output_tokens: int | None = Field(default=None, ge=1)
    prefix_id: int | None = Field(default=None, ge=0)
    num_prefix_tokens: int = Field(default=0, ge=0)
    tenant: str = ""
    priority: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = f"num_prefix_tokens={self.num_prefix_tokens}"
        if self.num_prefix_tokens > self.num_prompt_tokens:
            raise ValueError(f"{given}: must be <= num_prompt_tokens={self.num_prompt_tokens}")
        if (self.prefix_id is None) != (self.num_prefix_tokens == 0):
            raise ValueError(f"{given}: must be > 0 when prefix_id is given, and only then")
        return self


def read_trace(path: Path, *, has_arrivals: bool = True) -> Iterator[SimulatedRequest]:
    """The requests of a trace as it stands, read as they are asked for.

    Args:
        path: A `.csv` or a `.jsonl` file.
        has_arrivals: False: the trace need not say when requests come, and all come at 0.

    Raises:
        ConfigError: The file cannot be read, or a line is no request or earlier than the one
            before it; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _jsonl_rows(file) if path.suffix == ".jsonl" else _csv_rows(file)
            yield from _requests(rows, has_arrivals=has_arrivals)
    except _RowError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a readable text file: {error}") from error


class _RowError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _requests(
    rows: Iterator[tuple[int, dict[str, Any]]], *, has_arrivals: bool
) -> Iterator[SimulatedRequest]:
    last_s, begin_s = 0.0, None
    for line, row in rows:
        if not has_arrivals:
            row["arrival_s"] = 0.0
        try:
            record = TraceRecord.model_validate(row)
        except ValidationError:
            raise _RowError(line, "; ".join(find_mistakes(TraceRecord, row))) from None
        if record.arrival_s < last_s:
            given = f"arrival_s={record.arrival_s}"
            raise _RowError(line, f"{given}: must be >= {last_s}, the one before; sort the file")
        last_s = record.arrival_s
        if begin_s is None:
            begin_s = last_s if last_s >= _FIRST_DATE_S else 0.0
        yield SimulatedRequest(**dict(record) | {"arrival_s": last_s - begin_s})


def _jsonl_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _RowError(number, f"must be JSON: {error}") from None
        if not isinstance(row, dict):
            raise _RowError(number, "must be a JSON object")
        yield number, row


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines)
    try:
        header = next(reader, [])
        columns, parse_arrival = _csv_columns(header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise _RowError(reader.line_num, f"has {len(cells)} cells, not {len(header)}")
            row: dict[str, Any] = {}
            for field, column in columns.items():
                text = cells[column].strip()
                row[field] = parse_arrival(text) if field == "arrival_s" else _parse(int, text)
            yield reader.line_num, row
    except csv.Error as error:
        raise _RowError(reader.line_num, f"must be CSV: {error}") from None


def _csv_columns(header: list[str]) -> tuple[dict[str, int], Callable[[str], object]]:
    """Where each field stands, and what reads an arrival."""
    names = [name.strip() for name in header]
    for columns in _CSV_COLUMNS:
        if set(columns[1:]) <= set(names):
            places = {
                field: names.index(column)
                for field, column in zip(_FIELDS, columns, strict=True)
                if column in names
            }
            is_date = columns[0] == "TIMESTAMP"
            return places, _TimestampParser() if is_date else _parse_seconds
    known = " or ".join(", ".join(columns) for columns in _CSV_COLUMNS)
    raise _RowError(1, f"columns {names}: must include {known}")


def _parse(kind: type[int] | type[float], text: str) -> object:
    """A number; text that is none is left for the schema to complain of."""
    with suppress(ValueError):
        return kind(text)
    return text


def _parse_seconds(text: str) -> object:
    return _parse(float, text)


class _TimestampParser:
    """Reads dates as seconds since the first of them."""

    def __init__(self) -> None:
        self._first: datetime | None = None

    def __call__(self, text: str) -> object:
        try:
            time = datetime.fromisoformat(text)
            self._first = self._first or time
            return (time - self._first).total_seconds()
        except (ValueError, TypeError):  # TypeError: only one of the two has a time zone.
            return text
