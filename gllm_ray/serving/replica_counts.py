"""How many replicas run, whether Serve's controller answers or not."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from gllm_ray.errors import PipelineError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


class ReplicaCounts:
    """Running replicas of each deployment, as of the latest answer.

    One question at a time is under way, in a thread of its own: one that is not answered, because
    the controller is being replaced, holds up neither others nor what else needs threads.

    Args:
        ask: Returns the number of running replicas by deployment; may block for ever.
    """

    def __init__(self, ask: Callable[[], Mapping[str, int]]) -> None:
        self._ask = ask
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replica_counts")
        self._answer: asyncio.Future[Mapping[str, int]] | None = None
        self._counts: Mapping[str, int] | None = None

    async def of(self, deployment: str) -> int:
        """The number of replicas of a deployment that run; of an unknown one, 0.

        Raises:
            PipelineError: There has been no answer at all.
        """
        if self._answer is None:
            loop = asyncio.get_running_loop()
            self._answer = loop.run_in_executor(self._thread, self._ask)
            self._answer.add_done_callback(self._take)
        await asyncio.wait([self._answer], timeout=_TIMEOUT_S)
        if self._counts is None:
            raise PipelineError("Serve's controller does not tell which replicas run")
        return self._counts.get(deployment, 0)

    def _take(self, answer: asyncio.Future[Mapping[str, int]]) -> None:
        self._answer = None
        if (error := answer.exception()) is None:
            self._counts = answer.result()
        else:
            logger.warning("Serve's controller does not tell which replicas run: %s", error)
