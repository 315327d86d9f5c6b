"""Parquet and CSV: a column of prompts in, the same rows with columns of answers out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from gllm_ray.batch.records import BatchRow, Mistake, is_success, text_and_usage
from gllm_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    Columns = TypeVar("Columns", pa.Table, pa.RecordBatch)

TABLE_SUFFIXES = (".parquet", ".csv")
# What a template may raise because of a row's values, with which it may compute.
_TEMPLATE_FAULTS = (TemplateError, ValueError, TypeError, LookupError, ArithmeticError)
# What the output has of its own, and the types, as Arrow names them.
ADDED_COLUMNS = {
    "custom_id": "string",
    "generated_text": "string",
    "num_input_tokens": "int64",
    "num_generated_tokens": "int64",
    "finish_reason": "string",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTemplate:
    """How a row of a table becomes a request.

    Attributes:
        model: As clients name it.
        url: The route.
        prompt_column: Where the prompt lies; None: the template names columns by itself.
        template: In Jinja, over the row's columns, and over the prompt column as `prompt`; None:
            the prompt column alone.
        id_column: Where the custom id lies; None: `row-1` and so on.
        params: What the body has beside the model and the prompt.
    """

    model: str
    url: str
    prompt_column: str | None
    template: str | None
    id_column: str | None
    params: Mapping[str, Any]

    def compile(self) -> Callable[[int, Mapping[str, Any]], BatchRow | Mistake]:
        """What makes a request of a row's number and columns.

        Raises:
            ConfigError: The template is none.
        """
        try:
            jinja = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
            template = jinja.from_string("{{ prompt }}" if self.template is None else self.template)
        except TemplateError as error:
            raise ConfigError(f"--template={self.template!r}: is no template: {error}") from error

        def make(number: int, columns: Mapping[str, Any]) -> BatchRow | Mistake:
            for column in (self.prompt_column, self.id_column):
                if column is not None and columns[column] is None:
                    return Mistake(number=number, message=f"{column} is null")
            prompt = {} if self.prompt_column is None else {"prompt": columns[self.prompt_column]}
            custom_id = f"row-{number}" if self.id_column is None else columns[self.id_column]
            try:
                text = template.render({**columns, **prompt})
            except _TEMPLATE_FAULTS as error:
                return Mistake(number=number, message=f"--template: {error}")
            return BatchRow(
                number=number, custom_id=str(custom_id), url=self.url, body=self._body(text)
            )

        return make

    def _body(self, text: str) -> dict[str, Any]:
        is_chat = self.url == "/v1/chat/completions"
        prompt = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
        return {"model": self.model, **prompt, **self.params}


def read_table(path: Path, template: RowTemplate) -> Iterator[BatchRow | Mistake]:
    """The rows of a table as requests.

    Raises:
        ConfigError: It lacks a column, or cannot be read.
    """
    make = template.compile()
    number = 0
    for batch in _read_batches(path):
        _check_columns(path, batch.schema.names, template)
        for columns in batch.to_pylist():
            number += 1
            yield make(number, columns)


def check_output(path: Path, suffix: str) -> None:
    """Return if the rows of a table can be given back in a format.

    Args:
        path: The table.
        suffix: Of the format to write.

    Raises:
        ConfigError: CSV has no place for one of its columns.
    """
    if suffix != ".csv":
        return
    fields = next((batch.schema for batch in _read_batches(path)), ())
    # Of lists, structs and maps, which have fields of their own.
    if nested := [field.name for field in fields if field.type.num_fields]:
        raise ConfigError(
            f"--output: must be Parquet or JSONL, for CSV has no place for {', '.join(nested)} of "
            f"{path}"
        )


def write_table(
    path: Path,
    source: Path,
    suffix: str,
    rows: Iterator[BatchRow],
    read: Callable[[str], Mapping[str, Any]],
) -> None:
    """Write the rows of a table that succeeded, with what was generated.

    Args:
        path: Where to.
        source: The table.
        suffix: Of the format to write.
        rows: Those of the table, in its order.
        read: The record of a custom id.
    """
    with ExitStack() as stack:
        writer = None
        for batch in _read_batches(source):
            answered = _with_answers(batch, [read(next(rows).custom_id) for _ in range(len(batch))])
            if writer is None:
                writer = stack.enter_context(_open_writer(path, suffix, answered.schema))
            writer.write_batch(answered)
    if writer is None:
        path.touch()


def add_columns(
    table: "Columns", types: Mapping[str, str], rows: Sequence[Sequence[object]]
) -> "Columns":
    """Add columns to a table, or to a batch of one; those that have their names go.

    Args:
        table: What to add them to.
        types: Of each column, by its name.
        rows: A value for each column, row by row.
    """
    import pyarrow as pa

    for i, (name, kind) in enumerate(types.items()):
        table = table.drop_columns([name]) if name in table.schema.names else table
        table = table.append_column(name, pa.array([row[i] for row in rows], kind))
    return table


def _with_answers(
    batch: "pa.RecordBatch", records: Sequence[Mapping[str, Any]]
) -> "pa.RecordBatch":
    import pyarrow as pa

    is_kept = [is_success(record) for record in records]
    answers = [_answer_columns(record) for record in compress(records, is_kept)]
    return add_columns(batch.filter(pa.array(is_kept, pa.bool_())), ADDED_COLUMNS, answers)


def _answer_columns(record: Mapping[str, Any]) -> tuple[str, str, int, int, str]:
    body = record["response"]["body"]
    return record["custom_id"], *text_and_usage(body), body["choices"][0]["finish_reason"]


def _read_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: needs pyarrow, which is not installed; pip install 'gllm_ray[data]'"
        ) from error
    try:
        if path.suffix == ".csv":
            with csv.open_csv(path) as batches:
                names = batches.schema.names
            # Cells as they are spelled: a type that is inferred makes 1234 of 01234.
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            with csv.open_csv(path, convert_options=as_text) as batches:
                yield from batches
        else:
            with parquet.ParquetFile(path) as table:
                yield from table.iter_batches(batch_size=1024)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _check_columns(path: Path, names: list[str], template: RowTemplate) -> None:
    for option, column in (
        ("--prompt-column", template.prompt_column),
        ("--id-column", template.id_column),
    ):
        if column is not None and column not in names:
            raise ConfigError(f"{option}={column}: {path} has the columns {', '.join(names)}")
    # An id column of that name holds what the output says there.
    taken = [name for name in ADDED_COLUMNS if name in names]
    if template.id_column == "custom_id":
        taken.remove("custom_id")
    if taken:
        raise ConfigError(f"{path}: has a column {taken[0]}, which is the output's; rename it")


def _open_writer(path: Path, suffix: str, schema: "pa.Schema") -> Any:  # noqa: ANN401
    from pyarrow import csv, parquet

    return (csv.CSVWriter if suffix == ".csv" else parquet.ParquetWriter)(path, schema)
