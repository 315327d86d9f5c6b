"""How hidden states travel from a stage to the next one.

Neighbours share one edge with its own rendezvous store and its own two-rank process group, so a
lost stage invalidates its own edges and not the whole pipeline.
"""

from collections import deque
from datetime import timedelta
from functools import cache
from typing import Literal, Protocol

import numpy as np
import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from gllm_ray.config import PipelineConfig
from gllm_ray.messages import EdgeAddress
from gllm_ray.stages.shared_card import CudaCard, SlotPool, meet_on_card

Transport = Literal["nccl", "cuda_ipc", "gloo", "object_store"]

UPSTREAM, DOWNSTREAM = 0, 1  # ranks of the two ends of an edge

# How long one end of an edge waits for the other to join, which may first have to join its other
# edge: all stages begin at once, and NCCL takes some seconds for one. Over gloo also the time for
# bytes that are on their way, as a receive is posted after the matching send was issued.
_TIMEOUT = timedelta(seconds=30)
# On NCCL a transfer's time runs from when it is enqueued, behind steps that may each take
# `recovery.step_timeout_s`: longer than any of them. Our own watch finds what hangs.
_NCCL_TIMEOUT = timedelta(days=1)
# Sends that may be under way at once; each keeps its hidden states alive.
_MAX_PENDING_SENDS = 4
_NUM_TAGS = 2**31
# With what else an answer holds, this stays below the 100 KB up to which Ray sends it in line.
MAX_CARRIED_BYTES = 2**16


class ActivationChannel(Protocol):
    """One end of an edge: the upstream stage sends on it, the downstream stage receives."""

    def probe(self) -> None:
        """Return once data can pass; both ends call this before anything else.

        Raises:
            RuntimeError: The other end is gone, or this one was told to `abort`.
        """

    def send(self, batch_id: int, hidden: torch.Tensor) -> object:
        """Start to send hidden states, which nobody may change from then on.

        Returns:
            What the step's answer must carry to the downstream end; None if nothing.

        Raises:
            RuntimeError: An earlier send failed.
        """

    def receive(self, batch_id: int, carried: object, hidden: torch.Tensor) -> None:
        """Fill `hidden` with what the upstream end sent for the micro-batch.

        Args:
            batch_id: The micro-batch.
            carried: What `send` returned.
            hidden: The contiguous destination, of the shape and dtype that was sent.

        Raises:
            RuntimeError: The upstream end is gone, or nothing came in time.
        """

    def abort(self) -> None:
        """End transfers on a device that wait for the other end; from any thread, while others run.

        What they were to fill is undefined then. The channel can only be closed from now on.
        """

    def close(self) -> None:
        """Drop what was not received yet; the channel cannot be used again."""


class CarriedChannel:
    """Hidden states as the return value of the step: no connection, but two more copies."""

    def probe(self) -> None:
        """Nothing has to be connected."""

    def send(self, batch_id: int, hidden: torch.Tensor) -> list[object]:
        """Return whose hidden states they are, and their bytes, since numpy has no bfloat16."""
        return [batch_id, hidden.cpu().contiguous().view(torch.uint8).numpy()]

    def receive(self, batch_id: int, carried: list[object], hidden: torch.Tensor) -> None:
        """Copy out of memory that is read-only: an array in the object store, or bytes."""
        sent_id, content = carried
        if sent_id != batch_id:
            raise RuntimeError(f"the hidden states of micro-batch {sent_id} came instead")
        staged = _staging(hidden, "cpu")
        target = staged.view(torch.uint8).numpy()
        np.copyto(target, np.frombuffer(content, np.uint8).reshape(target.shape))
        hidden.copy_(staged)

    def abort(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing is held here."""


class ProcessGroupChannel:
    """Hidden states point to point over a two-rank process group.

    Args:
        group: Joins the two ends.
        end: `UPSTREAM` or `DOWNSTREAM`.
        device_type: Where the group takes tensors: `cpu` for gloo, `cuda` for NCCL.
    """

    def __init__(
        self,
        group: "ProcessGroupGloo | torch.distributed.ProcessGroupNCCL",
        end: int,
        device_type: str,
    ) -> None:
        self._group: ProcessGroupGloo | torch.distributed.ProcessGroupNCCL | None = group
        self._peer = 1 - end
        self._device_type = device_type
        self._pending: deque[tuple[torch.distributed.Work, torch.Tensor]] = deque()

    def probe(self) -> None:
        """Let NCCL connect, which it does at its first transfer, before the first request."""
        if self._peer == DOWNSTREAM:
            self.send(0, torch.ones(1))
            return
        received = torch.zeros(1, device=self._device_type)
        self.receive(0, None, received)
        # On a GPU `receive` returns before the data is there, and an abort ends it without.
        if received.item() != 1:
            raise RuntimeError("the edge was left before data could pass")

    def send(self, batch_id: int, hidden: torch.Tensor) -> None:
        """Issue the send; waits only while too many earlier ones are under way."""
        if len(self._pending) == _MAX_PENDING_SENDS:
            self._pending.popleft()[0].wait()
        staged = hidden.to(self._device_type).contiguous()
        work = self._group.send([staged], self._peer, batch_id % _NUM_TAGS)
        self._pending.append((work, staged))

    def receive(self, batch_id: int, carried: object, hidden: torch.Tensor) -> None:
        """Wait for the bytes on gloo; on NCCL make the current stream wait for them."""
        staged = _staging(hidden, self._device_type)
        self._group.recv([staged], self._peer, batch_id % _NUM_TAGS).wait()
        hidden.copy_(staged)

    def abort(self) -> None:
        """End NCCL's kernels, which wait for a dead peer for ever; gloo notices one by itself."""
        if (group := self._group) is not None:  # no other thread closed this
            group.abort()

    def close(self) -> None:
        """Leave the group, so that the other end fails too instead of waiting."""
        self._pending.clear()
        self.abort()
        self._group = None  # gloo's abort does nothing, but the last reference ends the connection


class BySizeChannel:
    """Small hidden states go with the step's answer, large ones over another channel.

    Over gloo the two ends exchange messages before the data flows, for which a receiving stage
    waits idly, and the longer the busier the cores are.

    Args:
        large: Takes what is larger than `MAX_CARRIED_BYTES`.
    """

    def __init__(self, large: ActivationChannel) -> None:
        self._small = CarriedChannel()
        self._large = large

    def probe(self) -> None:
        """See `ActivationChannel`."""
        self._large.probe()

    def send(self, batch_id: int, hidden: torch.Tensor) -> object:
        """See `ActivationChannel`."""
        return self._channel_of(hidden).send(batch_id, hidden)

    def receive(self, batch_id: int, carried: object, hidden: torch.Tensor) -> None:
        """See `ActivationChannel`."""
        self._channel_of(hidden).receive(batch_id, carried, hidden)

    def abort(self) -> None:
        """See `ActivationChannel`."""
        self._large.abort()

    def close(self) -> None:
        """See `ActivationChannel`."""
        self._large.close()

    def _channel_of(self, hidden: torch.Tensor) -> ActivationChannel:
        return self._small if hidden.nbytes <= MAX_CARRIED_BYTES else self._large


def resolve_transport(pipeline: PipelineConfig) -> Transport:
    """The transport in force: `auto` never puts two ranks of NCCL on one GPU."""
    if pipeline.activation_transport != "auto":
        return pipeline.activation_transport
    if pipeline.device == "cpu":
        return "gloo"
    return "nccl" if pipeline.gpus_per_stage == 1 else "cuda_ipc"


def host_edge(host: str) -> TCPStore:
    """Open an edge's rendezvous at its upstream end, on a port the system picks."""
    return TCPStore(host, 0, 2, is_master=True, timeout=_TIMEOUT, wait_for_workers=False)


def find_edge(address: EdgeAddress) -> TCPStore:
    """Reach an edge's rendezvous from its downstream end."""
    return TCPStore(*address, 2, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)


def join_edge(
    transport: Literal["nccl", "cuda_ipc", "gloo"],
    store: TCPStore,
    end: int,
    host: str,
    max_in_flight: int,
) -> ActivationChannel:
    """Become one end of an edge; data can pass after its `probe`.

    Args:
        transport: What carries the hidden states; with `cuda_ipc` gloo does where the two ends are
            on different cards.
        store: The edge's rendezvous.
        end: `UPSTREAM` or `DOWNSTREAM`.
        host: Address of this node in the cluster.
        max_in_flight: Micro-batches that the pipeline may hold.

    Raises:
        RuntimeError: The other end did not join in time.
    """
    # NCCL would wait for the other end for ever.
    store.set(f"end {end}", "here")
    store.wait([f"end {1 - end}"], _TIMEOUT)
    if transport == "cuda_ipc":
        shared = meet_on_card(_slot_pool(), store, end, max_in_flight)
        if shared is not None:
            return shared
        transport = "gloo"
    device_type = "cuda" if transport == "nccl" else "cpu"
    channel = ProcessGroupChannel(_open_group(transport, store, end, host), end, device_type)
    return channel if transport == "nccl" else BySizeChannel(channel)


@cache
def _slot_pool() -> SlotPool:
    """Of this process's GPU."""
    return SlotPool(CudaCard())


def _open_group(
    transport: Literal["nccl", "gloo"], store: TCPStore, rank: int, host: str
) -> "ProcessGroupGloo | torch.distributed.ProcessGroupNCCL":
    if transport == "nccl":
        from torch.distributed import ProcessGroupNCCL  # builds for CPU lack it

        options = ProcessGroupNCCL.Options()
        options._timeout = _NCCL_TIMEOUT  # noqa: SLF001
        return ProcessGroupNCCL(store, rank, 2, options)
    options = ProcessGroupGloo._Options()  # noqa: SLF001
    options._timeout = _TIMEOUT  # noqa: SLF001
    # By default gloo binds to whatever the host name resolves to, often the loopback.
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
    return ProcessGroupGloo(store, rank, 2, options)


def _staging(hidden: torch.Tensor, device_type: str) -> torch.Tensor:
    """`hidden` itself where it can be filled directly, else a buffer to copy from."""
    if hidden.device.type == device_type:
        return hidden
    return torch.empty_like(hidden, device=device_type)
