"""Hidden states between two cards."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gllm_ray.stages.transport import (
    DOWNSTREAM,
    UPSTREAM,
    EdgeAddress,
    find_edge,
    host_edge,
    join_edge,
)
from tests.gpu.cards import needs_two_gpus

pytestmark = needs_two_gpus

LOOPBACK = "127.0.0.1"
SHAPES = [(1, 64), (33, 4096), (2048, 8192)]


def hidden_states(batch_id, dtype, device):
    generator = torch.Generator().manual_seed(batch_id)
    return torch.randn(*SHAPES[batch_id], generator=generator).to(device, dtype)


def send(port, dtype):
    """The upstream end, in a process of its own on the first card."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    channel = join_edge("nccl", find_edge(EdgeAddress(LOOPBACK, port)), UPSTREAM, LOOPBACK, 1)
    channel.probe()
    for batch_id in range(len(SHAPES)):
        assert channel.send(batch_id, hidden_states(batch_id, dtype, device)) is None
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_arrive_bit_by_bit_and_in_order(dtype):
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    store = host_edge(LOOPBACK)
    sender = multiprocessing.get_context("spawn").Process(target=send, args=(store.port, dtype))
    sender.start()
    try:
        channel = join_edge("nccl", store, DOWNSTREAM, LOOPBACK, 1)
        channel.probe()
        for batch_id in range(len(SHAPES)):
            expected = hidden_states(batch_id, dtype, device)
            received = torch.empty_like(expected)
            channel.receive(batch_id, None, received)
            assert torch.equal(received, expected)
        channel.close()
    finally:
        sender.join(60)
        torch.cuda.set_device(0)
    assert sender.exitcode == 0


def join_and_die(port):
    """An upstream end that goes before it sends."""
    torch.cuda.set_device(0)
    join_edge("nccl", find_edge(EdgeAddress(LOOPBACK, port)), UPSTREAM, LOOPBACK, 1).probe()
    torch.cuda.synchronize()
    os._exit(0)


def test_an_abort_ends_the_receive_from_a_process_that_died(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(1)
    store = host_edge(LOOPBACK)
    sender = multiprocessing.get_context("spawn").Process(target=join_and_die, args=(store.port,))
    sender.start()
    try:
        channel = join_edge("nccl", store, DOWNSTREAM, LOOPBACK, 1)
        channel.probe()
        sender.join(60)
        channel.receive(0, None, torch.empty(2048, 8192, device="cuda:1"))
        with ThreadPoolExecutor() as threads:
            threads.submit(channel.abort).result(timeout=30)
        torch.cuda.synchronize()
        channel.close()
    finally:
        sender.kill()
        torch.cuda.set_device(0)
