"""Implementations of the seams that run on a script."""

import asyncio
from collections import deque

from gllm_ray.engine.client import EngineClient
from gllm_ray.engine.engine import Engine
from gllm_ray.errors import PipelineError
from gllm_ray.messages import GenerationRequest, MicroBatch, MicroBatchResult, TokenEvent
from tests.factories import make_scheduler, prompt_logprobs_of


class ScriptedPipeline:
    """A pipeline whose model says the same to everybody: the tokens of a script, again and again.

    Attributes:
        num_tokens: Tokens sampled so far, over all sequences.
        failure: Set it to break the pipeline at the next result.
    """

    def __init__(self, script: list[int], *, hold_after: int | None = None) -> None:
        self.num_tokens = 0
        self.failure: PipelineError | None = None
        self._script = script
        self._hold_after = hold_after
        self._queue: deque[MicroBatch] = deque()
        self._said: dict[int, int] = {}
        self._released = asyncio.Event()

    def release(self) -> None:
        """Go on after `hold_after` tokens."""
        self._released.set()

    def submit(self, batch: MicroBatch) -> None:
        self._queue.append(batch)

    async def next_result(self) -> MicroBatchResult:
        await asyncio.sleep(0)
        if self._hold_after is not None and self.num_tokens >= self._hold_after:
            await self._released.wait()
        if self.failure is not None:
            raise self.failure
        batch = self._queue.popleft()
        token_ids = tuple(
            self._say(item.seq_id) for item in batch.sequences if item.sampling is not None
        )
        return MicroBatchResult(
            batch_id=batch.batch_id,
            token_ids=token_ids,
            prompt_logprobs=prompt_logprobs_of(batch),
        )

    def _say(self, seq_id: int) -> int:
        position = self._said.get(seq_id, 0)
        self._said[seq_id] = position + 1
        self.num_tokens += 1
        return self._script[position % len(self._script)]

    async def close(self) -> None:
        pass


class ScriptedEndpoint:
    """An engine endpoint whose events the test sends one by one.

    Attributes:
        added: Every accepted request.
        aborted: The id of every abort.
        completed: How many tokens those of them had that were complete.
        refusal: Set it to refuse the next requests.
    """

    def __init__(self) -> None:
        self.added: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.completed: dict[str, int] = {}
        self.refusal: Exception | None = None
        self.may_add = asyncio.Event()
        self.may_add.set()
        self.may_abort = asyncio.Event()
        self.may_abort.set()
        self._news: asyncio.Queue[list[TokenEvent] | Exception] = asyncio.Queue()

    def send(self, *events: TokenEvent) -> None:
        self._news.put_nowait(list(events))

    def fail(self, error: Exception) -> None:
        self._news.put_nowait(error)

    async def add(self, request: GenerationRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.added.append(request)
        await self.may_add.wait()

    async def abort(self, request_id: str, num_output_tokens: int | None = None) -> None:
        await self.may_abort.wait()
        self.aborted.append(request_id)
        if num_output_tokens is not None:
            self.completed[request_id] = num_output_tokens

    async def next_events(self) -> list[TokenEvent]:
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news


class LocalService:
    """A `GenerationService` in this process: the real engine over a scripted pipeline."""

    model_name = "demo/model"

    def __init__(
        self,
        tokenizer,
        pipeline: ScriptedPipeline,
        *,
        max_model_len: int = 128,
        num_blocks: int = 256,
        **scheduler_options,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.pipeline = pipeline
        self.scheduler = make_scheduler(
            num_blocks=num_blocks, max_model_len=max_model_len, **scheduler_options
        )
        self.requests: list[GenerationRequest] = []
        self._engine = Engine(self.scheduler, pipeline)
        self._client = EngineClient(self._engine)

    async def __aenter__(self):
        self._engine.start()
        await self._client.start()
        return self

    async def __aexit__(self, *_exc_info) -> None:
        await self._client.close()
        await self._engine.close()

    async def until_idle(self) -> None:
        """Return when no request is alive and every KV block is back."""
        async with asyncio.timeout(5):
            # The scheduler has no event to wait for.
            while self.scheduler.kv_utilization or not self.scheduler.is_idle:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def generate(self, request: GenerationRequest):
        self.requests.append(request)
        return self._client.generate(request)

    async def check_ready(self) -> None:
        await self._client.check_health()

    async def server_info(self):
        return {"model": self.model_name, "kv_utilization": self.scheduler.kv_utilization}
