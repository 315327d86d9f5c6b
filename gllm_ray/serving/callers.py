"""Actors that sent requests here and may die: Ray lets what a dead actor called run to its end."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0


class CallerWatch:
    """Aborts the requests of callers that died.

    Args:
        abort: Ends a request early.
    """

    def __init__(self, abort: Callable[[str], Awaitable[None]]) -> None:
        self._abort = abort
        self._requests: dict[ActorHandle, set[str]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def note(self, caller: ActorHandle, request_id: str) -> Iterator[None]:
        """Watch the caller while its request is open here."""
        requests = self._requests.get(caller)
        if requests is None:
            requests = self._requests[caller] = set()
            watch = asyncio.create_task(self._watch(caller))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        requests.add(request_id)
        try:
            yield
        finally:
            requests.discard(request_id)

    async def _watch(self, caller: ActorHandle) -> None:
        """Ask the caller whether it lives, until it has no request here, or is dead."""
        while self._requests[caller]:
            await asyncio.sleep(_PERIOD_S)
            try:
                await caller.__ray_ready__.remote()
            except ActorDiedError:
                # As they end they leave the set.
                requests = [*self._requests.pop(caller)]
                logger.warning("a front end died; %d requests of it are aborted", len(requests))
                for request_id in requests:
                    await self._abort(request_id)
                return
            except RayError:
                pass  # it may be back at the next look
        del self._requests[caller]
