"""Every way in which Ray reports a failure, in our words."""

import re

import pytest
import ray.exceptions
from ray.exceptions import (
    ActorDiedError,
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from gllm_ray.errors import (
    ConfigError,
    GllmRayError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
    StageLostError,
)
from gllm_ray.stages.ray_errors import translate_ray_error

DEATHS = [
    ActorDiedError(),
    ActorPlacementGroupRemoved(),
    ActorUnavailableError("no connection", None),
    ActorUnschedulableError("its node is gone"),
    LocalRayletDiedError(),
    NodeDiedError("no heartbeat"),
    OutOfMemoryError("out of memory"),
    OwnerDiedError("00", None, "here"),
    RayActorError(),
    WorkerCrashedError(),
]


def in_task(cause: Exception) -> RayTaskError:
    text = f"Traceback (most recent call last):\n{cause!r}"
    return RayTaskError("step", text, cause, "ray::step", 1, "host")


def as_raised_by_ray(cause: Exception) -> RayTaskError:
    """What awaiting a ref raises when its task, or one it depends on, raised `cause`."""
    return in_task(cause).as_instanceof_cause()


def test_no_class_that_reports_a_death_is_missing_here() -> None:
    pattern = r"Died|Crashed|OutOfMemory|^Actor\w*(Unavailable|Unschedulable|Removed)|^RayActor"
    names = {
        name
        for name, value in vars(ray.exceptions).items()
        if isinstance(value, type) and issubclass(value, RayError) and re.search(pattern, name)
    }
    assert names == {type(error).__name__ for error in DEATHS}


@pytest.mark.parametrize("error", DEATHS, ids=lambda error: type(error).__name__)
def test_every_death_is_a_lost_stage_also_as_the_cause_of_a_later_stages_failure(
    error: RayError,
) -> None:
    nested = as_raised_by_ray(as_raised_by_ray(error))
    for raised in (error, as_raised_by_ray(error), nested):
        translated = translate_ray_error(raised, "stage 3")
        assert isinstance(translated, StageLostError)
        assert str(translated).startswith("stage 3 was lost: ")
        assert len(str(translated).splitlines()) == 1


def test_the_death_of_another_actor_is_not_told_as_that_of_a_stage() -> None:
    translated = translate_ray_error(ActorDiedError(), "the scheduler", lost=PipelineError)
    assert type(translated) is PipelineError
    assert str(translated).startswith("the scheduler was lost: ")


@pytest.mark.parametrize("ours", [ConfigError("a=1: must be 2"), PipelineError("broke")])
def test_our_own_error_comes_out_as_itself(ours: Exception) -> None:
    assert translate_ray_error(as_raised_by_ray(as_raised_by_ray(ours))) is ours


@pytest.mark.parametrize(
    "ours",
    [
        InvalidRequestError("no", param="n", code="c"),
        OverloadedError("full", retry_after_s=7.2),
        PipelineError("stage 1 of host x broke", public_message="broke"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_client_is_told_crosses_from_one_process_to_another(ours: GllmRayError) -> None:
    received = RayError.from_bytes(in_task(ours).to_bytes())
    translated = translate_ray_error(received.as_instanceof_cause())
    assert type(translated) is type(ours)
    assert (str(translated), vars(translated)) == (str(ours), vars(ours))


def test_the_failure_of_an_actors_start_says_why_without_a_traceback() -> None:
    error = ActorDiedError(in_task(ImportError("no torch here")))
    assert str(translate_ray_error(error, "stage 0")) == (
        "stage 0 was lost: ImportError('no torch here')"
    )


@pytest.mark.parametrize(
    "error", [RuntimeEnvSetupError("no such image"), RaySystemError("no message"), ValueError("x")]
)
def test_anything_else_is_a_pipeline_error_that_names_its_type(error: Exception) -> None:
    translated = translate_ray_error(as_raised_by_ray(error), "stage 1")
    assert type(translated) is PipelineError
    assert str(translated).startswith(f"stage 1 failed: {type(error).__name__}: ")
