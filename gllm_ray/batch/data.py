"""Ray Data: a processor that takes and gives the columns of `ray.data.llm`.

Rows come with `prompt` or `messages`, and with `sampling_params`, each as OpenAI's API spells it.
They leave with `generated_text`, `num_input_tokens`, `num_generated_tokens`, and, where a row may
fail alone, `__inference_error__`, which is empty if it did not.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.batch.pipeline import start_pipeline
from gllm_ray.batch.records import Answer, BatchRow
from gllm_ray.config import ServiceConfig
from gllm_ray.errors import InvalidRequestError
from gllm_ray.serve_file import load_only_service
from gllm_ray.stages.placement import REPLICA_CPUS

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from gllm_ray.batch.answers import EngineAnswers

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]

_CLOSE_TIMEOUT_S = 30.0
ERROR_COLUMN = "__inference_error__"
ADDED_COLUMNS = ("generated_text", "num_input_tokens", "num_generated_tokens", ERROR_COLUMN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """What `ray.data.llm`'s configurations say, of our pipelines.

    Attributes:
        service: What each pipeline is, or the Serve configuration that tells.
        batch_size: Rows that travel together.
        concurrency: Pipelines side by side; of two numbers, the fewest and the most.
        max_concurrent_batches: Batches that a pipeline runs at once.
        should_continue_on_error: Whether a row that fails leaves with its error, and not the
            dataset.
    """

    service: ServiceConfig | Path
    batch_size: int = 32
    concurrency: int | tuple[int, int] = 1
    max_concurrent_batches: int = 8
    should_continue_on_error: bool = False


def build_processor(
    config: ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
) -> "Callable[[Dataset], Dataset]":
    """A function from a dataset to one with answers, as that of `ray.data.llm` makes it.

    Args:
        config: Of the pipelines.
        preprocess: From a row to the columns a pipeline needs; the others are kept.
        postprocess: From a row, with the answer in it, to what leaves; None: all of it. Rows that
            failed leave without it.

    Raises:
        ConfigError: The Serve configuration has mistakes.
    """
    from ray.data import ActorPoolStrategy

    service = config.service
    if isinstance(service, Path):
        service = load_only_service(service)
    pool = config.concurrency
    least, most = (pool, pool) if isinstance(pool, int) else pool

    def process(dataset: "Dataset") -> "Dataset":
        if preprocess is not None:
            dataset = dataset.map(lambda row: {**row, **preprocess(row)})
        dataset = dataset.map_batches(
            _PipelineOfPool,
            fn_constructor_args=(service, config.should_continue_on_error),
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
                max_tasks_in_flight_per_actor=2 * config.max_concurrent_batches,
            ),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            num_cpus=REPLICA_CPUS,
        )
        if postprocess is not None:
            dataset = dataset.map(_without_errors(postprocess, config.should_continue_on_error))
        return dataset

    return process


def _without_errors(postprocess: RowFunction, keeps_column: bool) -> RowFunction:
    def apply(row: Row) -> Row:
        if row[ERROR_COLUMN]:
            return row
        return {**postprocess(row), **({ERROR_COLUMN: ""} if keeps_column else {})}

    return apply


class _PipelineOfPool:
    """An actor of Ray Data's pool, and its pipeline."""

    def __init__(self, config: ServiceConfig, continues_on_error: bool) -> None:
        self._config = config
        self._continues_on_error = continues_on_error
        self._starting: asyncio.Task[EngineAnswers] | None = None
        self._stack = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, batch: "pa.Table") -> "AsyncIterator[pa.Table]":
        """Answer the rows of a batch, side by side."""
        if self._starting is None:  # here, because only here there is an event loop
            self._loop = asyncio.get_running_loop()
            pipeline = start_pipeline(self._config)
            self._starting = asyncio.create_task(self._stack.enter_async_context(pipeline))
        answers = await asyncio.shield(self._starting)
        model = self._config.model.name
        results = await asyncio.gather(
            *(answers.answer(_to_request(model, row)) for row in batch.to_pylist())
        )
        yield _add_columns(batch, [self._columns_of(result) for result in results])

    def __del__(self) -> None:
        """Called by Ray Data, in another thread, when there is no more to do."""
        # Processes would end with this one, but Ray keeps a placement group as long as the job.
        if self._loop is not None:
            closing = asyncio.run_coroutine_threadsafe(self._stack.aclose(), self._loop)
            closing.result(_CLOSE_TIMEOUT_S)

    def _columns_of(self, answer: Answer) -> tuple[str, int, int, str]:
        if answer.status != 200:
            message = answer.body["error"]["message"]
            if not self._continues_on_error:
                raise InvalidRequestError(message)
            return "", 0, 0, message
        choice, usage = answer.body["choices"][0], answer.body["usage"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return text, usage["prompt_tokens"], usage["completion_tokens"], ""


def _to_request(model: str, row: Mapping[str, Any]) -> BatchRow:
    """A row's request; columns that are null say nothing."""
    key = "messages" if row.get("messages") is not None else "prompt"
    url = "/v1/chat/completions" if key == "messages" else "/v1/completions"
    sampling = row.get("sampling_params") or {}
    # Arrow fills in, with null, what other rows of the dataset have.
    body = {name: value for name, value in sampling.items() if value is not None}
    if row.get(key) is not None:
        body[key] = row[key]
    return BatchRow(number=0, custom_id="", url=url, body={"model": model, **body})


def _add_columns(batch: "pa.Table", answers: list[tuple[str, int, int, str]]) -> "pa.Table":
    import pyarrow as pa

    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string())
    for i, (name, kind) in enumerate(zip(ADDED_COLUMNS, kinds, strict=True)):
        column = pa.array([answer[i] for answer in answers], kind)
        batch = batch.drop_columns([name]) if name in batch.column_names else batch
        batch = batch.append_column(name, column)
    return batch
