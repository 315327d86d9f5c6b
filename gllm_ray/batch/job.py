"""The job: every row once, whatever ends it meanwhile."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError

from gllm_ray.batch.answers import Answers
from gllm_ray.batch.journal import Journal
from gllm_ray.batch.progress import Progress
from gllm_ray.batch.records import BatchRow, Mistake, encode_record, is_success, make_record
from gllm_ray.batch.requests import RequestChecks
from gllm_ray.batch.tables import TABLE_SUFFIXES, write_table
from gllm_ray.batch.workspace import Workspace
from gllm_ray.errors import ConfigError, InvalidRequestError
from gllm_ray.serving.errors import HttpError


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job ended.

    Attributes:
        num_rows: Of the input.
        num_failed: Those in the file of errors.
    """

    num_rows: int
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A file of requests, and where its answers go.

    Attributes:
        name: The input, as messages name it.
        source: The input's local file.
        read_rows: Its rows, from the first; each call reads anew.
        output_suffix: Says the output's format.
        identity: What may not change while the job is resumed, as JSON has it.
        checks: What every row must pass before one is run.
        start_answers: Starts who answers; entered only if there is something to do.
        max_in_flight: Rows that run at once.
        retry_errors: Whether rows that failed in an earlier run are run again.
    """

    name: str
    source: Path
    read_rows: Callable[[], Iterator[BatchRow | Mistake]]
    output_suffix: str
    identity: dict[str, Any]
    checks: RequestChecks
    start_answers: Callable[[], AbstractAsyncContextManager[Answers]]
    max_in_flight: int
    retry_errors: bool = False

    async def run(self, workspace: Workspace) -> JobResult:
        """Go on from where the workspace's journal ends, and write the outputs.

        Raises:
            ConfigError: A row is wrong, and none was run; or the workspace is of another job.
            PipelineError: No row can be run any more; those that were are in the journal.
        """
        with closing(Journal(workspace.journal_path)) as journal:
            num_rows = await self._prepare(workspace, journal)
            todo = {
                row.number
                for row in self._rows()
                if not journal.is_done(row.custom_id, with_success=self.retry_errors)
            }
            if todo:
                await self._run_rows(todo, workspace, journal, num_rows)
            result = JobResult(num_rows=num_rows, num_failed=journal.num_failed)
            await asyncio.to_thread(self._publish, workspace, journal)
        manifest = {**self.identity, "num_rows": num_rows, "num_failed": result.num_failed}
        workspace.write_manifest({**manifest, "is_complete": True})
        return result

    async def _prepare(self, workspace: Workspace, journal: Journal) -> int:
        """Check the whole input, or that it is what it was; the number of its rows."""
        manifest = workspace.read_manifest()
        if manifest is not None:
            refuse_changes(manifest, self.identity)
            num_rows: int = manifest["num_rows"]
            return num_rows
        if workspace.has_output() or journal.num_done:
            raise ConfigError(
                "the output or its .part exists, and no manifest says that this job wrote it; "
                "remove both, or give another --output"
            )
        num_rows = await self._validate()
        workspace.write_manifest({**self.identity, "num_rows": num_rows, "is_complete": False})
        return num_rows

    async def _validate(self) -> int:
        mistakes: list[Mistake] = []
        first_numbers: dict[str, int] = {}
        num_rows = 0
        for row in self.read_rows():
            num_rows += 1
            mistake = row if isinstance(row, Mistake) else await self._find_mistake(row)
            if mistake is None and isinstance(row, BatchRow):
                first = first_numbers.setdefault(row.custom_id, row.number)
                if first != row.number:
                    message = f"custom_id={row.custom_id!r}: is that of row {first}, too"
                    mistake = Mistake(number=row.number, message=message)
            if mistake is not None:
                mistakes.append(mistake)
        if mistakes:
            lines = [f"{self.name}:{mistake.number}: {mistake.message}" for mistake in mistakes]
            raise ConfigError("\n".join([*lines, f"{len(mistakes)} mistakes; no row was run"]))
        if not num_rows:
            raise ConfigError(f"{self.name}: has no row")
        return num_rows

    async def _find_mistake(self, row: BatchRow) -> Mistake | None:
        try:
            await self.checks.check(row)
        except (InvalidRequestError, RequestValidationError) as error:
            return Mistake(number=row.number, message=HttpError.of(error).message)
        return None

    async def _run_rows(
        self, numbers: set[int], workspace: Workspace, journal: Journal, num_rows: int
    ) -> None:
        rows = (row for row in self._rows() if row.number in numbers)
        with Progress(num_rows=num_rows, num_done=num_rows - len(numbers)) as progress:
            async with self.start_answers() as answers:
                progress.start()
                run = _Run(rows, answers, workspace, journal, progress)
                await run.until_done(min(self.max_in_flight, len(numbers)))

    def _rows(self) -> Iterator[BatchRow]:
        return (row for row in self.read_rows() if isinstance(row, BatchRow))

    def _publish(self, workspace: Workspace, journal: Journal) -> None:
        """Write the answers and the errors, each in the order of the input."""
        is_table = self.output_suffix in TABLE_SUFFIXES

        def write_output(path: Path) -> None:
            if is_table:
                rows, suffix = self._rows(), self.output_suffix
                write_table(path, self.source, suffix, rows, journal.read)
            else:
                self._write_records(path, journal, with_success=True)

        workspace.publish(write_output, is_errors=False)
        workspace.publish(
            lambda path: self._write_records(path, journal, with_success=False), is_errors=True
        )

    def _write_records(self, path: Path, journal: Journal, *, with_success: bool) -> None:
        with path.open("wb") as file:
            for row in self._rows():
                record = journal.read(row.custom_id)
                if is_success(record) is with_success:
                    file.write(encode_record(record))


class _Run:
    """Workers that take rows, and a writer that takes their records to the journal together."""

    def __init__(
        self,
        rows: Iterator[BatchRow],
        answers: Answers,
        workspace: Workspace,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._rows = rows
        self._answers = answers
        self._workspace = workspace
        self._journal = journal
        self._progress = progress
        self._finished: list[dict[str, Any]] = []
        self._has_news = asyncio.Event()
        self._is_over = False

    async def until_done(self, num_workers: int) -> None:
        """Return, or raise, when every finished row is in the journal."""
        writer = asyncio.create_task(self._write())
        workers = [asyncio.create_task(self._work()) for _ in range(num_workers)]
        all_work = asyncio.gather(*workers)
        try:
            await asyncio.wait([all_work, writer], return_when=asyncio.FIRST_COMPLETED)
            if all_work.done():
                all_work.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(all_work, *workers, return_exceptions=True)
            self._is_over = True
            self._has_news.set()
            await writer

    async def _work(self) -> None:
        for row in self._rows:
            answer = await self._answers.answer(row)
            self._finished.append(make_record(row.custom_id, answer))
            self._has_news.set()

    async def _write(self) -> None:
        """Write all that gathered while the disk was busy, again and again."""
        is_last = False
        while not is_last:
            await self._has_news.wait()
            self._has_news.clear()
            is_last = self._is_over
            records, self._finished = self._finished, []
            await asyncio.to_thread(self._journal.append, records)
            await asyncio.to_thread(self._workspace.save, is_last=is_last)
            self._progress.note(records)


def refuse_changes(manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Let a job be resumed only as what it began as.

    Raises:
        ConfigError: One line for each part of its identity that changed.
    """
    lines = [
        f"{key} changed: was {manifest.get(key)}, is {value}"
        for key, value in identity.items()
        if manifest.get(key) != value
    ]
    if lines:
        hint = "give another --output, or remove its .part and .manifest.json to start again"
        raise ConfigError("\n".join([*lines, f"the job cannot be resumed: {hint}"]))
