"""Edges within a card, whose memory the host's stands in for: two processes share it as well."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory

import pytest
import torch

from gllm_ray.config import PipelineConfig
from gllm_ray.policy_config import POLICY_CONFIGS
from gllm_ray.scheduling import SchedulerSettings, make_policy
from gllm_ray.scheduling.flights import Flights
from gllm_ray.stages.shared_card import (
    SharedCardChannel,
    Slot,
    SlotHandle,
    SlotPool,
    meet_on_card,
)
from gllm_ray.stages.transport import DOWNSTREAM, UPSTREAM, EdgeAddress, find_edge, host_edge

LOOPBACK = "127.0.0.1"
NUM_SLOTS = 3


@dataclass
class HostSlot:
    shared: SharedMemory
    memory: torch.Tensor

    def note_written(self) -> None:
        """The host writes at once."""

    def wait_until_written(self) -> None:
        """The host has written."""


class HostCard:
    """Memory of the host, by name."""

    device = torch.device("cpu")

    def __init__(self, identity: str = "host", *, refuses: bool = False) -> None:
        self.identity = identity
        self._refuses = refuses
        self.num_slots = 0
        self.held: list[SharedMemory] = []

    def new_slot(self, num_bytes: int) -> HostSlot:
        shared = SharedMemory(create=True, size=num_bytes)
        self.held.append(shared)
        self.num_slots += 1
        return self._slot(shared)

    def share_slot(self, slot: HostSlot) -> SlotHandle:
        return [slot.shared.name]

    def open_slot(self, handle: SlotHandle) -> Slot:
        if self._refuses:
            raise RuntimeError("the driver refuses")
        return self._slot(SharedMemory(name=handle[0]))

    @staticmethod
    def _slot(shared: SharedMemory) -> HostSlot:
        return HostSlot(shared, torch.frombuffer(shared.buf, dtype=torch.uint8))


@pytest.fixture
def card() -> Iterator[HostCard]:
    card = HostCard()
    yield card
    for shared in card.held:
        shared.unlink()


def ends(card: HostCard) -> tuple[SharedCardChannel, SharedCardChannel]:
    pool = SlotPool(card)
    return SharedCardChannel(pool, NUM_SLOTS), SharedCardChannel(pool, NUM_SLOTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_many_micro_batches_as_slots_may_be_under_way(
    card: HostCard, dtype: torch.dtype
) -> None:
    upstream, downstream = ends(card)
    for first in range(0, 4 * NUM_SLOTS, NUM_SLOTS):
        sent = {first + i: torch.randn(7, 33).to(dtype) for i in range(NUM_SLOTS)}
        carried = {batch_id: upstream.send(batch_id, hidden) for batch_id, hidden in sent.items()}
        for batch_id, hidden in sent.items():
            received = torch.empty_like(hidden)
            downstream.receive(batch_id, carried[batch_id], received)
            assert torch.equal(received.view(torch.uint8), hidden.view(torch.uint8))
    assert card.num_slots == NUM_SLOTS  # which later micro-batches took again


def test_a_slot_grows_with_what_it_has_to_hold(card: HostCard) -> None:
    upstream, downstream = ends(card)
    for batch_id, num_rows in enumerate([1, 1, 1, 50, 1, 1, 60, 1]):
        sent = torch.randn(num_rows, 16)
        received = torch.empty_like(sent)
        downstream.receive(batch_id, upstream.send(batch_id, sent), received)
        assert torch.equal(received, sent)
    assert card.num_slots == NUM_SLOTS + 1


def test_edges_one_after_another_take_the_memory_of_one(card: HostCard) -> None:
    pool = SlotPool(card)
    num_slots = []
    for _ in range(4):
        upstream, downstream = (SharedCardChannel(pool, NUM_SLOTS) for _ in range(2))
        for batch_id, num_rows in enumerate([1, 1, 1, 50, 1, 60, 1, 90]):
            sent = torch.randn(num_rows, 16)
            received = torch.empty_like(sent)
            downstream.receive(batch_id, upstream.send(batch_id, sent), received)
            assert torch.equal(received, sent)
        num_slots.append(card.num_slots)
        upstream.close()
        downstream.close()
    assert num_slots == [num_slots[0]] * 4


def test_the_upstream_end_alone_gives_memory_back(card: HostCard) -> None:
    pools = SlotPool(card), SlotPool(card)
    upstream, downstream = (SharedCardChannel(pool, NUM_SLOTS) for pool in pools)
    sent = torch.randn(7)
    downstream.receive(0, upstream.send(0, sent), torch.empty_like(sent))
    upstream.close()
    downstream.close()
    for pool in reversed(pools):
        pool.take(sent.nbytes)
    assert card.num_slots == 2


def test_a_strided_tensor_is_sent_whole(card: HostCard) -> None:
    upstream, downstream = ends(card)
    sent = torch.arange(48.0).view(4, -1)[:, ::2]
    received = torch.empty(sent.shape)
    downstream.receive(1, upstream.send(1, sent), received)
    assert torch.equal(received, sent)


def test_the_hidden_states_of_another_micro_batch_are_refused(card: HostCard) -> None:
    upstream, downstream = ends(card)
    carried = upstream.send(4, torch.zeros(1))
    with pytest.raises(RuntimeError, match="of micro-batch 4 came"):
        downstream.receive(5, carried, torch.zeros(1))


@pytest.mark.parametrize("policy", POLICY_CONFIGS)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("max_in_flight", [None, 1, 7])
def test_a_pipeline_with_any_policy_holds_no_more_micro_batches_than_there_are_slots(
    policy: str, ring: bool, max_in_flight: int | None
) -> None:
    pipeline = PipelineConfig(num_stages=4, ring=ring, max_in_flight=max_in_flight)
    settings = SchedulerSettings(
        num_stages=4,
        num_blocks=8,
        block_size=16,
        max_model_len=128,
        max_decodes=16,
        max_in_flight=max_in_flight,
        ring=ring,
    )
    flights = Flights(settings, make_policy(POLICY_CONFIGS[policy]()).num_ahead)
    assert flights.max_in_flight <= pipeline.most_in_flight


def meet(upstream: HostCard, downstream: HostCard) -> list[SharedCardChannel | None]:
    store = host_edge(LOOPBACK)
    other = find_edge(EdgeAddress(LOOPBACK, store.port))
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(meet_on_card, SlotPool(upstream), store, UPSTREAM, NUM_SLOTS)
        receiving = meet_on_card(SlotPool(downstream), other, DOWNSTREAM, NUM_SLOTS)
        return [sending.result(), receiving]


def test_both_ends_of_one_card_meet_there(card: HostCard) -> None:
    upstream, downstream = meet(card, card)
    assert upstream is not None
    assert downstream is not None
    received = torch.empty(5)
    downstream.receive(9, upstream.send(9, torch.arange(5.0)), received)
    assert received.tolist() == [0, 1, 2, 3, 4]


def test_neither_end_uses_the_card_if_the_other_is_on_another(card: HostCard) -> None:
    assert meet(card, HostCard("other")) == [None, None]
    assert card.num_slots == 0


def test_neither_end_uses_a_card_whose_driver_refuses(
    card: HostCard, caplog: pytest.LogCaptureFixture
) -> None:
    assert meet(card, HostCard(refuses=True)) == [None, None]
    assert {record.getMessage() for record in caplog.records} == {
        "stages of one card exchange hidden states over the host: the driver refuses"
    }


class FullCard(HostCard):
    def new_slot(self, num_bytes: int) -> HostSlot:
        raise RuntimeError


def test_neither_end_uses_a_card_that_has_no_memory_left_and_does_not_say_so() -> None:
    assert meet(FullCard(), HostCard()) == [None, None]


def receive_elsewhere(port: int, num_batches: int) -> list[float]:
    """The downstream end, in another process; what it got, summed."""
    store = find_edge(EdgeAddress(LOOPBACK, port))
    channel = meet_on_card(SlotPool(HostCard()), store, DOWNSTREAM, NUM_SLOTS)
    assert channel is not None
    sums = []
    for batch_id in range(num_batches):
        received = torch.empty(batch_id + 1, 1000)
        index, *name = store.get(f"carried {batch_id}").decode().split()
        channel.receive(batch_id, [batch_id, int(index), name or None], received)
        sums.append(received.sum().item())
    return sums


def test_another_process_receives_what_was_sent(card: HostCard) -> None:
    store = host_edge(LOOPBACK)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        receiving = processes.submit(receive_elsewhere, store.port, NUM_SLOTS)
        channel = meet_on_card(SlotPool(card), store, UPSTREAM, NUM_SLOTS)
        assert channel is not None
        for batch_id in range(NUM_SLOTS):
            sent = torch.full((batch_id + 1, 1000), float(batch_id + 1))
            _, index, handle = channel.send(batch_id, sent)
            store.set(f"carried {batch_id}", " ".join([str(index), *(handle or [])]))
        assert receiving.result(timeout=60) == [1000, 4000, 9000]
