"""Messages between processes that come late, twice, in another order, or not at all."""

import asyncio

import pytest

from gllm_ray.stages import placement
from tests.faults.injection import arm, faulty_stage_actor
from tests.faults.replicas import (
    CAUSE,
    RECOVERED,
    logged,
    make_config,
    make_request,
    running,
)

# Chunks of a long prompt are large messages, decodes are small ones.
SCHEDULER = {
    "policy": {"name": "chunked_prefill", "token_budget": 256},
    "max_decodes": 64,
    "prefix_caching": False,
}
REQUESTS = [
    make_request("long a", prompt=tuple(range(5, 705)), max_tokens=12),
    make_request("short b", max_tokens=30),
    make_request("short c", max_tokens=30),
]
HARMLESS = None
# Of the target of the fault: what stage 0 sends over the wire (large) or with its answer (small),
# or the steps that stage 1 takes.
FAULTS = [
    ("large", "delay", HARMLESS),
    ("large", "drop", "hangs: micro-batch"),
    ("large", "duplicate", ...),  # harmless until the sender waits for the bytes to be taken
    ("large", "reorder", ...),  # harmless if another message follows
    ("small", "delay", HARMLESS),
    ("small", "drop", "failed to run micro-batch"),
    ("small", "duplicate", HARMLESS),
    ("small", "repeat", "came instead"),
    ("call", "delay", HARMLESS),
    ("call", "drop", "does not compute micro-batch"),
    ("call", "duplicate", "got micro-batch"),
]
IN_SHORT = {("large", "delay"), ("small", "repeat"), ("call", "drop")}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def pipeline(ray_cluster, loop, faults, control_plane):
    """One replica for all tests here: each leaves it repaired."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "StageActor", faulty_stage_actor(faults))
        config = make_config(
            2,
            control_plane=control_plane,
            scheduler=SCHEDULER,
            step_timeout_s=5,
            calm_s=0.01,
        )
        context = running(config)
        yield loop.run(context.__aenter__())
        loop.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def undisturbed(pipeline, loop):
    return loop.run(pipeline.collect_all(REQUESTS))


def cells():
    return [
        pytest.param(*fault, marks=() if fault[:2] in IN_SHORT else pytest.mark.chaos)
        for fault in FAULTS
    ]


@pytest.mark.parametrize(("target", "fault", "cause"), cells())
def test_a_mistreated_message_is_harmless_or_noticed_and_no_token_changes(
    pipeline, undisturbed, loop, faults, caplog, target, fault, cause
):
    check_mistreated(pipeline, undisturbed, loop, faults, caplog, target, fault, cause)


@pytest.mark.chaos
@pytest.mark.parametrize("control_plane", ["direct"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("delay", HARMLESS),
        ("drop", ...),  # noticed by the answer after it, or because nothing comes any more
        ("duplicate", "a message was lost"),
        ("reorder", ...),
    ],
)
def test_a_mistreated_answer_is_harmless_or_noticed_and_no_token_changes(
    pipeline, undisturbed, loop, faults, caplog, fault, cause
):
    check_mistreated(pipeline, undisturbed, loop, faults, caplog, "answer", fault, cause)


def check_mistreated(pipeline, undisturbed, loop, faults, caplog, target, fault, cause):
    async def scenario():
        streams = asyncio.create_task(pipeline.collect_all(REQUESTS))
        arm(faults, int(target == "call"), target, fault)
        answers = await streams
        return answers, await pipeline.replica.load()

    answers, load = loop.run(scenario())
    assert not list(faults.iterdir()), "the fault was not made"
    assert answers == undisturbed
    assert (load.num_requests, load.kv_utilization) == (0, 0)
    causes = logged(caplog, CAUSE)
    assert len(logged(caplog, RECOVERED)) == len(causes)
    if cause is not ...:
        assert len(causes) == (cause is not None)
        assert all(cause in line for line in causes)
