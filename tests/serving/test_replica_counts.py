"""How many replicas run, while Serve's controller answers, is away, or fails."""

import asyncio
import threading

import pytest

from gllm_ray.errors import PipelineError
from gllm_ray.serving import replica_counts
from gllm_ray.serving.replica_counts import ReplicaCounts


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(replica_counts, "_TIMEOUT_S", 0.05)


def test_the_latest_answer_holds_while_the_next_one_does_not_come_and_one_question_waits():
    gate, answers = threading.Event(), iter([{"a": 2}, {"a": 3}])
    num_asked = 0

    def ask():
        nonlocal num_asked
        num_asked += 1
        if num_asked > 1:
            gate.wait()
        return next(answers)

    async def run():
        counts = ReplicaCounts(ask)
        assert [await counts.of("a"), await counts.of("b")] == [2, 0]
        assert await asyncio.gather(*(counts.of("a") for _ in range(20))) == [2] * 20
        assert num_asked == 2
        gate.set()
        while await counts.of("a") != 3:
            pass

    try:
        asyncio.run(asyncio.wait_for(run(), 10))
    finally:
        gate.set()


def test_a_question_that_fails_is_asked_again_and_without_any_answer_nothing_is_claimed(caplog):
    def ask():
        if not caplog.records:
            raise RuntimeError("no controller")
        return {"a": 1}

    async def run():
        counts = ReplicaCounts(ask)
        with pytest.raises(PipelineError, match="does not tell"):
            await counts.of("a")
        assert await counts.of("a") == 1

    asyncio.run(run())
    assert "no controller" in caplog.text
