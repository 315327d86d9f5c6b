"""How micro-batches get to the stages, and the last stage's answers back: the seam.

A control plane serves one epoch of a pipeline. There are two: actor calls whose refs Ray chains
(`ref_chain`), and messages of the stages' own (`direct_loop`).
"""

from typing import NamedTuple, Protocol

from gllm_ray.errors import GllmRayError
from gllm_ray.messages import MicroBatch


class Failed(NamedTuple):
    """What went wrong at a stage."""

    stage_id: int
    error: GllmRayError


class ControlPlane(Protocol):
    """Carries micro-batches and answers, both in the order in which they were submitted."""

    def submit(self, batch: MicroBatch) -> None:
        """Tell every stage of a micro-batch; returns at once and raises nothing."""

    async def next_answer(self) -> tuple[int, list[object]]:
        """Wait for the last stage's answer to the oldest micro-batch.

        Returns:
            The id of the micro-batch, and what `Stage.step` returned.

        Raises:
            GllmRayError: A step failed or a stage died, as it showed first; `end` knows more.
        """

    @property
    def oldest(self) -> int | None:
        """Id of the oldest micro-batch that has no answer."""

    async def first_silent(self) -> int:
        """The first stage that has not computed the oldest micro-batch."""

    async def end(self) -> list[Failed]:
        """Let the stages fall idle; nothing is carried from then on.

        Returns:
            What went wrong at which stage, a cause before its consequences.
        """
