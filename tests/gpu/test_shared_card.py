"""Hidden states between two processes on one card."""

from multiprocessing import get_context

import pytest
import torch

from gllm_ray.stages.shared_card import CudaCard, meet_on_card
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
    channel = meet_on_card(CudaCard(), store, UPSTREAM, NUM_SLOTS)
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
        channel = meet_on_card(CudaCard(), store, DOWNSTREAM, NUM_SLOTS)
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
