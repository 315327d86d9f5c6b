"""Hidden states between two processes on one card."""

import time
from multiprocessing import get_context

import pytest
import torch

from gllm_ray.stages.shared_card import CudaCard, SlotPool, meet_on_card
from gllm_ray.stages.transport import DOWNSTREAM, UPSTREAM, EdgeAddress, find_edge, host_edge
from tests.gpu.cards import CARD, needs_gpu

pytestmark = needs_gpu

LOOPBACK = "127.0.0.1"
NUM_SLOTS = 2
SHAPES = [(1, 64), (33, 4096), (2048, 8192), (1, 64)]


def hidden_states(batch_id, dtype):
    generator = torch.Generator().manual_seed(batch_id)
    return torch.randn(*SHAPES[batch_id], generator=generator).to(CARD, dtype)


def send(port, dtype, carried, received):
    """The upstream end, never further ahead than there are slots."""
    torch.cuda.set_device(CARD)
    store = find_edge(EdgeAddress(LOOPBACK, port))
    channel = meet_on_card(SlotPool(CudaCard()), store, UPSTREAM, NUM_SLOTS)
    assert channel is not None
    for batch_id in range(len(SHAPES)):
        carried.put(channel.send(batch_id, hidden_states(batch_id, dtype)))
        if batch_id + 1 >= NUM_SLOTS:
            received.get(timeout=60)
    received.get(timeout=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_arrive_bit_by_bit_while_slots_are_used_again(dtype):
    torch.cuda.set_device(CARD)
    processes = get_context("spawn")
    carried, received = processes.Queue(), processes.Queue()
    store = host_edge(LOOPBACK)
    sender = processes.Process(target=send, args=(store.port, dtype, carried, received))
    sender.start()
    try:
        channel = meet_on_card(SlotPool(CudaCard()), store, DOWNSTREAM, NUM_SLOTS)
        assert channel is not None
        for batch_id in range(len(SHAPES)):
            expected = hidden_states(batch_id, dtype)
            hidden = torch.empty_like(expected)
            channel.receive(batch_id, carried.get(timeout=60), hidden)
            assert torch.equal(hidden, expected)
            received.put(batch_id)
        channel.close()
    finally:
        sender.join(60)
    assert sender.exitcode == 0


def send_each(port, num_edges, carried):
    """The upstream end of one edge after another, with the memory that is held after each."""
    torch.cuda.set_device(CARD)
    store, pool = find_edge(EdgeAddress(LOOPBACK, port)), SlotPool(CudaCard())
    for edge in range(num_edges):
        prefixed = torch.distributed.PrefixStore(str(edge), store)
        channel = meet_on_card(pool, prefixed, UPSTREAM, NUM_SLOTS)
        carried.put(channel.send(0, hidden_states(2, torch.bfloat16)))
        store.wait([f"{edge} was killed"])
        channel.close()
        carried.put(torch.cuda.memory_allocated(CARD))


def receive_and_die(port, edge, carried, values):
    torch.cuda.set_device(CARD)
    store = find_edge(EdgeAddress(LOOPBACK, port))
    prefixed = torch.distributed.PrefixStore(str(edge), store)
    channel = meet_on_card(SlotPool(CudaCard()), prefixed, DOWNSTREAM, NUM_SLOTS)
    expected = hidden_states(2, torch.bfloat16)
    hidden = torch.empty_like(expected)
    channel.receive(0, carried.get(timeout=60), hidden)
    values.put(torch.equal(hidden, expected))
    time.sleep(60)


def test_downstream_ends_that_are_killed_leave_no_memory_behind():
    processes = get_context("spawn")
    carried, values = processes.Queue(), processes.Queue()
    store, num_edges, held = host_edge(LOOPBACK), 3, []
    sender = processes.Process(target=send_each, args=(store.port, num_edges, carried))
    sender.start()
    try:
        for edge in range(num_edges):
            receiver = processes.Process(
                target=receive_and_die, args=(store.port, edge, carried, values)
            )
            receiver.start()
            assert values.get(timeout=60)
            receiver.kill()
            receiver.join()
            store.set(f"{edge} was killed", "")
            held.append(carried.get(timeout=60))
    finally:
        sender.join(60)
    assert sender.exitcode == 0
    assert held == [held[0]] * num_edges
