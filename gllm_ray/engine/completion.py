"""How who reads the events of a request tells that its output is complete."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from gllm_ray.messages import TokenEvent

Events = AsyncGenerator[list[TokenEvent], None]


class OutputCompleteError(Exception):
    """Thrown into events of which no more are needed, for the text has come to a stop string.

    Attributes:
        num_output_tokens: Tokens of the output, up to the one that completed the stop string.
    """

    def __init__(self, num_output_tokens: int) -> None:
        super().__init__(num_output_tokens)
        self.num_output_tokens = num_output_tokens


@asynccontextmanager
async def passing_on(events: Events) -> AsyncIterator[Events]:
    """Close events on exit, as `aclosing` does; `OutputCompleteError` is thrown into them, too."""
    try:
        yield events
    except OutputCompleteError as end:
        await complete(events, end)
        raise
    finally:
        await events.aclose()


async def complete(events: Events, end: OutputCompleteError) -> None:
    """Tell a stream of events that its output is complete."""
    with suppress(OutputCompleteError, StopAsyncIteration):
        await events.athrow(end)
