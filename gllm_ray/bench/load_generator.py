"""Sends requests as they come, in real time, to whatever serves them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.errors import GllmRayError


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """A request as its client saw it, in seconds of the event loop's clock.

    Whoever sends it sets what has a default, and calls `note_message`.

    Attributes:
        start_s: When it was to be sent, from which its latencies count.
        lag_s: How much later it was sent, because this process was busy.
        message_times_s: When each message with output tokens came; one may hold several.
        num_prompt_tokens: As the service counts them.
        num_output_tokens: As the service counts them.
        error: Why it did not get its output; empty: it did.
    """

    start_s: float
    lag_s: float
    message_times_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    def note_message(self) -> None:
        """Output tokens have come."""
        self.message_times_s.append(asyncio.get_running_loop().time())


class Load(NamedTuple):
    """What clients saw.

    Attributes:
        wall_s: From the start of the workload to the end of its last request.
        records: Of each request, in the order of the workload.
    """

    wall_s: float
    records: list[RequestRecord]


# Sends a request and returns when it has ended; raises a `GllmRayError` if it failed.
Send = Callable[[LoadRequest, RequestRecord], Awaitable[None]]


async def send_load(
    send: Send, requests: Sequence[LoadRequest], *, max_concurrency: int | None = None
) -> Load:
    """Let all requests come and end.

    A request that is sent late, because this process was busy, counts from when it was to come;
    one that was held back counts from when it was let go.

    Args:
        send: Sends one of them.
        requests: In the order of their arrival.
        max_concurrency: Requests that run at once; others are held back. None: as many as come.
    """
    loop = asyncio.get_running_loop()
    slots = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    start_s = loop.time()

    async def run(request: LoadRequest) -> RequestRecord:
        due_s = start_s + request.arrival_s
        await asyncio.sleep(due_s - loop.time())
        async with slots:
            sent_s = loop.time()
            begin_s = due_s if max_concurrency is None else sent_s
            record = RequestRecord(start_s=begin_s, lag_s=sent_s - begin_s)
            try:
                await send(request, record)
            except GllmRayError as error:
                record.error = str(error) or type(error).__name__
        return record

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run(request)) for request in requests]
    return Load(loop.time() - start_s, [task.result() for task in running])
