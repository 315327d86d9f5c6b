"""Steps reach a stage, and their outcome the next one, over real sockets."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.errors import PipelineError
from gllm_ray.stages.inbox import Inbox, Message, Outbox
from gllm_ray.stages.step_messages import (
    ANSWER,
    FAILURE,
    STOP,
    Step,
    StepFailure,
    StepQueue,
    batch_message,
    run_steps,
)

HOST = "127.0.0.1"


def queue_of(inbox: Inbox, *, is_first: bool) -> StepQueue:
    return StepQueue(inbox, lambda: True, max_in_flight=4 if is_first else None)


@contextmanager
def opened(*, is_first: bool) -> Iterator[tuple[Outbox, StepQueue]]:
    inbox = Inbox(HOST)
    outbox = Outbox(inbox.address)
    yield outbox, queue_of(inbox, is_first=is_first)
    outbox.close()
    inbox.close()


def steps_of(messages: Sequence[Message], *, is_first: bool) -> list[Step]:
    with opened(is_first=is_first) as (outbox, steps):
        for message in (*messages, [STOP]):
            outbox.write(message)
        return list(iter(steps.next, None))


@st.composite
def interleavings(draw: st.DrawFn) -> list[Message]:
    """Micro-batches and answers of as many steps, each kind in order."""
    num_steps = draw(st.integers(0, 6))
    kinds = draw(st.permutations([True] * num_steps + [False] * num_steps))
    batches = iter([batch_message(i, None, b"batch %d" % i) for i in range(num_steps)])
    answers = iter([[ANSWER, i, f"answer {i}"] for i in range(num_steps)])
    return [next(batches if is_batch else answers) for is_batch in kinds]


@settings(max_examples=30, deadline=None)
@given(interleavings())
def test_steps_pair_micro_batch_and_answer_in_order_whichever_comes_first(
    messages: list[Message],
) -> None:
    assert steps_of(messages, is_first=False) == [
        Step(i, b"batch %d" % i, f"answer {i}") for i in range(len(messages) // 2)
    ]


def test_the_first_stage_waits_for_the_answers_that_micro_batches_continue_and_no_others() -> None:
    messages = [
        batch_message(0, None, b"0"),
        batch_message(1, None, b"1"),
        batch_message(2, 0, b"2"),
        batch_message(3, 0, b"3"),
        batch_message(4, 1, b"4"),
        [ANSWER, 0, "zero"],
        [ANSWER, 1, "one"],
    ]
    steps = steps_of(messages, is_first=True)
    assert [step.batch_id for step in steps] == list(range(5))
    assert [step.previous for step in steps] == [None, None, "zero", "zero", "one"]


@pytest.mark.parametrize("is_first", [False, True])
def test_answers_that_nothing_waits_for_are_forgotten(is_first: bool) -> None:
    with opened(is_first=is_first) as (outbox, steps):
        for batch_id in range(2000):
            outbox.write([ANSWER, batch_id, "x"])
            outbox.write(batch_message(batch_id, None, b""))
            steps.next()
        assert len(steps._answers) < 10


@contextmanager
def chain(run_step: Callable[[int], Callable[[bytes, object], object]]) -> Iterator[list[Message]]:
    """Three stages, each in a thread, which have got ten micro-batches; yields what they tell."""
    with ExitStack() as stack:
        inboxes = [Inbox(HOST) for _ in range(4)]
        threads = []
        for stage_id in range(3):
            steps = queue_of(inboxes[stage_id], is_first=stage_id == 0)
            arguments = (stage_id, steps, run_step(stage_id), [inboxes[stage_id + 1].address])
            threads.append(threading.Thread(target=run_steps, args=arguments))
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        for outbox in [Outbox(inbox.address) for inbox in inboxes[:3]]:
            stack.callback(outbox.close)
            stack.callback(outbox.write, [STOP])
            for batch_id in range(10):
                outbox.write(batch_message(batch_id, None, bytes([batch_id])))
        told: list[Message] = []
        while len(told) < 10 and (not told or told[-1][0] == ANSWER):
            told += filter(None, [inboxes[3].read()])
        yield told


def test_what_a_stage_answers_is_what_the_next_one_gets() -> None:
    def run_step(stage_id: int) -> Callable[[bytes, object], object]:
        return lambda metadata, previous: [*(previous or []), stage_id, metadata[0]]

    with chain(run_step) as told:
        assert told == [[ANSWER, i, [0, i, 1, i, 2, i]] for i in range(10)]


def test_a_failure_comes_in_the_place_of_its_answer_and_names_the_stage_that_failed() -> None:
    def run_step(stage_id: int) -> Callable[[bytes, object], object]:
        def step(metadata: bytes, previous: object) -> object:
            if stage_id == 1 and metadata[0] == 3:
                raise PipelineError("out of luck")
            return None

        return step

    with chain(run_step) as told:
        assert told == [*([ANSWER, i, None] for i in range(3)), [FAILURE, 3, 1, "out of luck"]]


def test_a_failure_of_the_stage_before_is_told_and_not_run() -> None:
    messages = [[FAILURE, 0, 2, "why"], batch_message(0, None, b"")]
    assert steps_of(messages, is_first=False) == [Step(0, b"", StepFailure(2, "why"))]


@pytest.mark.parametrize(
    ("messages", "is_first"),
    [
        ([batch_message(1, None, b""), [ANSWER, 0, None]], False),
        ([[ANSWER, 1, None], batch_message(0, None, b"")], False),
        ([batch_message(2, 0, b""), [ANSWER, 1, None]], True),
    ],
    ids=["micro-batch", "answer", "answer by the ring"],
)
def test_a_lost_message_is_noticed_as_soon_as_the_next_one_of_its_kind_is_there(
    messages: list[Message], is_first: bool
) -> None:
    with pytest.raises(RuntimeError, match="a message was lost"):
        steps_of(messages, is_first=is_first)


def test_who_waits_for_steps_looks_up_when_the_stage_is_no_more_connected() -> None:
    inbox = Inbox(HOST)
    assert StepQueue(inbox, lambda: False, max_in_flight=None).next() is None
    inbox.close()


def test_what_is_no_array_of_numbers_is_not_sent_as_one() -> None:
    with opened(is_first=True) as (outbox, _), pytest.raises(TypeError, match="int64 cannot"):
        outbox.write([np.int64(1)])


def test_an_array_arrives_as_its_bytes() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (step,) = steps_of([batch_message(0, None, b""), [ANSWER, 0, [[0, array], []]]], is_first=False)
    assert step.previous == [[0, array.tobytes()], []]


def test_who_does_not_know_the_key_of_an_inbox_writes_nothing_there() -> None:
    with opened(is_first=True) as (outbox, steps):
        address = steps._inbox.address
        other_key, _ = zmq.curve_keypair()
        strangers = [Outbox(address._replace(public_key=other_key))]
        plain = zmq.Context.instance().socket(zmq.PUSH)
        plain.connect(f"tcp://{address.host}:{address.port}")
        plain.send(b"\x91\x03", zmq.NOBLOCK)  # [STOP]
        for stranger in strangers:
            stranger.write([STOP])
        outbox.write(batch_message(0, None, b"known"))
        assert steps.next() == Step(0, b"known", None)
        assert not steps._inbox._socket.poll(300)
        for stranger in strangers:
            stranger.close()
        plain.close(linger=0)
