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

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gllm_ray.batch.pipeline import reserve, run_pipeline, wait_for_room
from gllm_ray.batch.records import Answer, BatchRow, text_and_usage
from gllm_ray.batch.tables import add_columns
from gllm_ray.bundles import REPLICA_CPUS
from gllm_ray.config import ServiceConfig
from gllm_ray.errors import InvalidRequestError
from gllm_ray.serve_file import load_only_service

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


Row = dict[str, Any]
RowFunction = Callable[[Row], Row]

ERROR_COLUMN = "__inference_error__"
ADDED_COLUMNS = {
    "generated_text": "string",
    "num_input_tokens": "int64",
    "num_generated_tokens": "int64",
    ERROR_COLUMN: "string",
}


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
            _PoolActor,
            fn_constructor_args=(service, config.should_continue_on_error),
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
                max_tasks_in_flight_per_actor=2 * config.max_concurrent_batches,
            ),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            num_cpus=0,  # the pipeline has its own
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


@ray.remote(max_restarts=0, num_cpus=REPLICA_CPUS)
class _PipelineActor:
    """Runs a pipeline in a placement group; ends with it."""

    async def start(self, config: ServiceConfig, group: PlacementGroup) -> None:
        """Called once, before anything else."""
        self._stack = AsyncExitStack()
        self._answers = await self._stack.enter_async_context(
            run_pipeline(config, group, is_single=True)
        )

    async def answer(self, rows: list[BatchRow]) -> list[Answer]:
        """Answer rows, side by side."""
        return await asyncio.gather(*map(self._answers.answer, rows))


class _PoolActor:
    """An actor of Ray Data's pool: it owns a pipeline.

    Ray ends it as soon as it waits for nothing, which a process that runs a pipeline always does;
    so that is another one.
    """

    def __init__(self, config: ServiceConfig, continues_on_error: bool) -> None:
        self._config = config
        self._continues_on_error = continues_on_error
        self._group = reserve(config)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)
        self._pipeline = _PipelineActor.options(scheduling_strategy=strategy).remote()
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, batch: "pa.Table") -> "AsyncIterator[pa.Table]":
        """Answer the rows of a batch."""
        if self._starting is None:  # here, because only here there is an event loop
            self._starting = asyncio.create_task(_start(self._pipeline, self._config, self._group))
        await asyncio.shield(self._starting)
        model = self._config.model.name
        rows = [_to_request(model, row) for row in batch.to_pylist()]
        answers = await self._pipeline.answer.remote(rows)
        yield add_columns(batch, ADDED_COLUMNS, [self._columns_of(answer) for answer in answers])

    def __del__(self) -> None:
        """Called by Ray Data at the end; Ray itself keeps the group as long as the job."""
        remove_placement_group(self._group)

    def _columns_of(self, answer: Answer) -> tuple[str, int, int, str]:
        if not answer.is_success:
            message = answer.body["error"]["message"]
            if not self._continues_on_error:
                raise InvalidRequestError(message)
            return "", 0, 0, message
        return (*text_and_usage(answer.body), "")


async def _start(pipeline: ActorHandle, config: ServiceConfig, group: PlacementGroup) -> None:
    await wait_for_room(group, config)
    await pipeline.start.remote(config, group)


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
