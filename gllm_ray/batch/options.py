"""What the command line of a batch takes."""

import argparse
from pathlib import Path, PurePosixPath

from gllm_ray.batch.api_key import API_KEY_VARIABLE
from gllm_ray.batch.locations import is_remote
from gllm_ray.batch.params import parse_params
from gllm_ray.batch.records import URLS
from gllm_ray.batch.tables import TABLE_SUFFIXES, RowTemplate
from gllm_ray.errors import ConfigError
from gllm_ray.option_types import positive

# A pipeline of one's own decides better what to begin with, the more rows it knows.
MAX_IN_FLIGHT = 8192
URL_MAX_IN_FLIGHT = 128
URL_TIMEOUT_S = 3600
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_OURS = ("model", "messages", "prompt")  # of the body of a table's row


def make_parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        prog="python -m gllm_ray.batch",
        description="Run a file of requests to its end, through a pipeline of its own or a service "
        "that runs. Started again, it goes on where it was.",
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--config", type=Path, metavar="FILE", help="whose pipeline to start")
    who.add_argument("--url", help="the address of a service that runs, as http://host:port")
    files = "a path, or a URI such as s3://bucket/name"
    parser.add_argument(
        "--input", required=True, help=f"OpenAI's batch JSONL, Parquet or CSV; {files}"
    )
    parser.add_argument(
        "--output",
        required=True,
        help=f"JSONL; for a table Parquet or CSV, too; {files}. Rows that failed go to "
        "NAME.errors.jsonl beside it",
    )
    parser.add_argument(
        "--address", help="with --config: the Ray cluster to join (default: RAY_ADDRESS, or a new)"
    )
    parser.add_argument(
        "--max-in-flight",
        type=positive,
        metavar="N",
        help="rows that the pipeline holds at once, of which it runs as many as it has room for "
        f"(default: {MAX_IN_FLIGHT}; with --url {URL_MAX_IN_FLIGHT})",
    )
    parser.add_argument(
        "--timeout-s",
        type=positive,
        metavar="S",
        help=f"with --url: seconds a row may take (default: {URL_TIMEOUT_S})",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="with --url: the environment variable that has the service's API key "
        f"(default: {API_KEY_VARIABLE}, if it is set)",
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="run the rows again that failed before"
    )
    _add_table_options(parser)
    return parser


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    table = parser.add_argument_group("tables")
    table.add_argument("--prompt-column", metavar="COLUMN", help="where the prompt lies")
    table.add_argument(
        "--template",
        help="a Jinja template of the prompt over the row's columns, such as 'Sum up: {{ text }}'; "
        "`prompt` is the prompt column",
    )
    table.add_argument("--id-column", metavar="COLUMN", help="the custom id (default: row-N)")
    table.add_argument("--endpoint", choices=URLS, help=f"the route (default: {URLS[0]})")
    table.add_argument("--params", help='more of the body, as JSON: {"max_tokens": 64, "seed": 1}')


def row_template(options: argparse.Namespace, model_name: str) -> RowTemplate | None:
    """How rows of a table become requests; None for JSONL, which has them.

    Raises:
        ConfigError: The options do not fit the files.
    """
    source, output = suffix_of(options.input), suffix_of(options.output)
    for option, suffix in (("--input", source), ("--output", output)):
        if suffix not in (*_JSONL_SUFFIXES, *TABLE_SUFFIXES):
            allowed = ", ".join((*_JSONL_SUFFIXES, *TABLE_SUFFIXES))
            raise ConfigError(f"{option}: the name must end with one of {allowed}, not {suffix!r}")
    given = {
        "--prompt-column": options.prompt_column,
        "--template": options.template,
        "--id-column": options.id_column,
        "--endpoint": options.endpoint,
        "--params": options.params,
    }
    if source in _JSONL_SUFFIXES:
        unused = [option for option, value in given.items() if value is not None]
        if unused:
            raise ConfigError(f"{unused[0]}: must be left out, the lines of {source} have it")
        if output in TABLE_SUFFIXES:
            raise ConfigError(f"--output: must be JSONL when the input is {source}")
        return None
    if options.prompt_column is None and options.template is None:
        raise ConfigError(f"{source}: needs --prompt-column, --template, or both")
    return RowTemplate(
        model=model_name,
        url=options.endpoint or URLS[0],
        prompt_column=options.prompt_column,
        template=options.template,
        id_column=options.id_column,
        params=parse_params(options.params or "{}", ours=_OURS),
    )


def suffix_of(location: str) -> str:
    """How the name of a file ends, whether a path or a URI."""
    path = location.partition("?")[0] if is_remote(location) else location
    return PurePosixPath(path).suffix
