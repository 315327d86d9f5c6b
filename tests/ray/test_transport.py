"""The edges between stages, both ends in this process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier, Event, get_ident
from types import SimpleNamespace

import pytest
import torch

from gllm_ray.bench.transport_stage import TransportStage
from gllm_ray.config import PipelineConfig
from gllm_ray.errors import PipelineError
from gllm_ray.messages import StepUnderWay
from gllm_ray.stages import stage as stage_module
from gllm_ray.stages import transport
from gllm_ray.stages.inbox import Inbox, Outbox
from gllm_ray.stages.step_messages import FAILURE, STOP, batch_message
from gllm_ray.stages.transport import (
    DOWNSTREAM,
    MAX_CARRIED_BYTES,
    UPSTREAM,
    ActivationChannel,
    CarriedChannel,
    EdgeAddress,
    find_edge,
    host_edge,
    join_edge,
    resolve_transport,
)
from tests.pipelines import make_service_config

LOOPBACK = "127.0.0.1"
NUM_MANY = 20  # more than may be under way
Edge = tuple[ActivationChannel, ActivationChannel]
Receiving = tuple[TransportStage, list[object]]


def join_gloo() -> Edge:
    store = host_edge(LOOPBACK)
    with ThreadPoolExecutor() as threads:
        upstream = threads.submit(join_edge, "gloo", store, UPSTREAM, LOOPBACK, 1)
        found = find_edge(EdgeAddress(LOOPBACK, store.port))
        return join_edge("gloo", found, DOWNSTREAM, LOOPBACK, 1), upstream.result()


@pytest.fixture(params=["gloo", "object_store"])
def edge(request: pytest.FixtureRequest) -> Iterator[Edge]:
    """The upstream end and the downstream end."""
    if request.param == "gloo":
        downstream, upstream = join_gloo()
    else:
        upstream, downstream = CarriedChannel(), CarriedChannel()
    yield upstream, downstream
    upstream.close()
    downstream.close()


def make_large() -> torch.Tensor:
    """Hidden states that do not go with the answer."""
    return torch.randn(4, MAX_CARRIED_BYTES)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "nccl"),
        ({"gpus_per_stage": 0.5}, "cuda_ipc"),
        ({"device": "cpu"}, "gloo"),
        ({"activation_transport": "gloo"}, "gloo"),
        ({"gpus_per_stage": 0.5, "activation_transport": "gloo"}, "gloo"),
        ({"activation_transport": "object_store"}, "object_store"),
    ],
)
def test_nccl_is_chosen_only_where_each_stage_has_a_gpu_of_its_own(
    given: dict[str, object], expected: str
) -> None:
    assert resolve_transport(PipelineConfig(**given)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [33, MAX_CARRIED_BYTES])
def test_hidden_states_arrive_bit_by_bit(edge: Edge, dtype: torch.dtype, num_columns: int) -> None:
    upstream, downstream = edge
    sent = torch.randn(7, num_columns).to(dtype)
    carried = upstream.send(0, sent)
    received = torch.empty_like(sent)
    downstream.receive(0, carried, received)
    assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))


def test_micro_batches_under_way_are_told_apart_by_id(edge: Edge) -> None:
    upstream, downstream = edge
    sent = {batch_id: make_large() for batch_id in (0, 5, 2**31 + 7)}
    carried = {batch_id: upstream.send(batch_id, hidden) for batch_id, hidden in sent.items()}
    for batch_id in reversed(sent):
        received = torch.empty(4, MAX_CARRIED_BYTES)
        downstream.receive(batch_id, carried[batch_id], received)
        assert torch.equal(received, sent[batch_id])


def test_a_strided_tensor_is_sent_whole(edge: Edge) -> None:
    upstream, downstream = edge
    sent = torch.arange(24.0).repeat(MAX_CARRIED_BYTES).view(4, -1)[:, ::2]
    received = torch.empty(sent.shape)
    downstream.receive(1, upstream.send(1, sent), received)
    assert torch.equal(received, sent)


def send_many(upstream: ActivationChannel, sent: list[int]) -> None:
    for batch_id in range(NUM_MANY):
        upstream.send(batch_id, make_large())
        sent.append(batch_id)


def test_a_stage_far_ahead_waits_for_the_next_one() -> None:
    downstream, upstream = join_gloo()
    sent: list[int] = []
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(send_many, upstream, sent)
        wait([sending], timeout=0.3)
        assert 1 < len(sent) < NUM_MANY
        for batch_id in range(NUM_MANY):
            downstream.receive(batch_id, None, torch.empty(4, MAX_CARRIED_BYTES))
        sending.result()


def test_closing_the_upstream_end_fails_a_receive_instead_of_leaving_it_waiting() -> None:
    downstream, upstream = join_gloo()
    upstream.send(0, make_large())
    upstream.close()
    with pytest.raises(RuntimeError):
        downstream.receive(0, None, torch.empty(4, MAX_CARRIED_BYTES))


def test_closing_the_downstream_end_fails_a_send_instead_of_leaving_it_waiting() -> None:
    downstream, upstream = join_gloo()
    downstream.close()
    with pytest.raises(RuntimeError):
        send_many(upstream, [])


@pytest.mark.parametrize("is_small", [True, False])
def test_only_small_hidden_states_go_with_the_answer(is_small: bool) -> None:
    downstream, upstream = join_gloo()
    sent = torch.randn(MAX_CARRIED_BYTES // 4 + (not is_small))
    carried = upstream.send(0, sent)
    assert (carried is not None) == is_small
    received = torch.empty_like(sent)
    downstream.receive(0, carried, received)
    assert torch.equal(received, sent)


def test_an_abort_spoils_no_close_and_may_come_again(edge: Edge) -> None:
    upstream, downstream = edge
    with ThreadPoolExecutor() as threads:
        for channel in (upstream, downstream, upstream):
            threads.submit(channel.abort).result()
    downstream.close()
    downstream.abort()


def make_stages(num_stages: int) -> list[TransportStage]:
    config = make_service_config(Path("none"), num_stages=num_stages)
    return [TransportStage(config, stage_id) for stage_id in range(num_stages)]


def test_all_stages_of_a_chain_join_their_first_edges_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_stages = 8
    all_join, joined = Barrier(num_stages, timeout=30), set()

    def join_together(*args: object) -> ActivationChannel:
        channel = join_edge(*args)
        if get_ident() not in joined:
            joined.add(get_ident())
            all_join.wait()  # one edge after another, it would break
        return channel

    monkeypatch.setattr(stage_module, "join_edge", join_together)
    stages = make_stages(num_stages)
    addresses = [None, *(stage.open_edge() for stage in stages[:-1])]
    with ThreadPoolExecutor(num_stages) as threads:
        list(threads.map(lambda stage, address: stage.connect(0, address), stages, addresses))
    assert len(joined) == num_stages


class EndlessGroup:
    """In place of NCCL's: a receive ends when data comes, which it never does, or by an abort."""

    def __init__(self) -> None:
        self.receiving, self._aborted = Event(), Event()

    def recv(self, *_: object) -> SimpleNamespace:
        self.receiving.set()
        return SimpleNamespace(wait=self._aborted.wait)

    def abort(self) -> None:
        self._aborted.set()


def test_who_leaves_its_edges_while_it_connects_waits_for_no_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = EndlessGroup()
    monkeypatch.setattr(transport, "_open_group", lambda *_: group)
    _, stage = make_stages(2)
    store = host_edge(LOOPBACK)
    store.set(f"end {UPSTREAM}", "here")
    with ThreadPoolExecutor() as threads:
        connecting = threads.submit(stage.connect, 0, EdgeAddress(LOOPBACK, store.port))
        assert group.receiving.wait(10)
        stage.leave_edges()
        is_over = not wait([connecting], timeout=5).not_done
        group.abort()
        assert is_over
        with pytest.raises(PipelineError, match="the edge was left before data could pass"):
            connecting.result()


def receiving_stage(monkeypatch: pytest.MonkeyPatch, fault: RuntimeError | None) -> Receiving:
    """The last of two on a GPU that has a receive to end, and what happens to that."""
    seen: list[object] = []

    class Stream:
        def synchronize(self) -> None:
            seen.append(stage.step_under_way() and "received")
            if fault is not None:
                raise fault

    class Group(EndlessGroup):
        def abort(self) -> None:
            seen.append("aborted")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    _, stage = make_stages(2)
    stage._worker._device = torch.device("cuda", 0)
    stage._epoch = 0
    stage._inbound = transport.ProcessGroupChannel(Group(), DOWNSTREAM, "cuda")
    return stage, seen


@pytest.mark.parametrize("fault", [None, RuntimeError("unspecified launch failure")])
def test_a_stage_that_fails_closes_its_edge_after_what_earlier_steps_receive_on_its_gpu(
    monkeypatch: pytest.MonkeyPatch, fault: RuntimeError | None
) -> None:
    stage, seen = receiving_stage(monkeypatch, fault)
    with pytest.raises(PipelineError, match="stage 1 failed to read a micro-batch"):
        stage.step(0, b"nothing that was encoded", None)
    assert seen == ["received", "aborted"]
    assert stage.step_under_way() is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [([FAILURE, 0, 0, "no memory"], ["received", "aborted"]), ([STOP], ["aborted"])],
)
def test_so_does_one_that_is_told_of_a_failure_but_none_that_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, message: list[object], expected: list[str]
) -> None:
    stage, seen = receiving_stage(monkeypatch, None)
    stage._inbox = Inbox(LOOPBACK)
    outbox = Outbox(stage._inbox.address)
    outbox.write(batch_message(0, None, b""))
    outbox.write(message)
    failure = stage.run(0, [])
    outbox.close()
    stage._inbox.close()
    assert (failure is None) == (message == [STOP])
    assert seen == expected


@pytest.mark.parametrize("fault", [None, RuntimeError("unspecified launch failure")])
def test_a_stage_that_waits_for_its_gpu_is_under_way_until_that_has_ended_its_steps(
    monkeypatch: pytest.MonkeyPatch, fault: RuntimeError | None
) -> None:
    (stage,) = make_stages(1)
    stage._worker._device = torch.device("cuda", 0)
    seen: list[StepUnderWay | None] = []

    def synchronize(_: torch.device) -> None:
        seen.append(stage.step_under_way())
        if fault is not None:
            raise fault

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if fault is None:
        stage.settle()
    else:
        with pytest.raises(PipelineError, match="stage 0 failed to end its steps: RuntimeError"):
            stage.settle()
    assert seen != [None]
    assert stage.step_under_way() is None
