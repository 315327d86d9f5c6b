"""Ray's exceptions in our words: the one boundary between the two."""

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from gllm_ray.errors import GllmRayError, PipelineError, StageLostError

T = TypeVar("T")

_LOST = (
    RayActorError,
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    WorkerCrashedError,
)


async def ask(ref: Awaitable[T], actor: str, *, lost: type[PipelineError] = StageLostError) -> T:
    """Await an actor's answer; Ray's errors come out as `translate_ray_error` says them."""
    try:
        return await ref
    except RayError as error:
        raise translate_ray_error(error, actor, lost=lost) from error


def translate_ray_error(
    error: BaseException, actor: str = "a stage", *, lost: type[PipelineError] = StageLostError
) -> GllmRayError:
    """Say in our errors what Ray reports.

    Args:
        error: What a call to `actor` raised.
        actor: How to name it.
        lost: What its death is.
    """
    while isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, GllmRayError):
        return error
    if isinstance(error, _LOST):
        return lost(f"{actor} was lost: {_reason(error)}")
    return PipelineError(f"{actor} failed: {type(error).__name__}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The one line of Ray's account that says what happened."""
    lines = str(error).splitlines() or [""]
    if getattr(error, "actor_init_failed", False):
        return lines[-1]
    line = next((line for line in lines if line.startswith("The actor is dead")), lines[0])
    return line.partition(" Some common causes include")[0]
