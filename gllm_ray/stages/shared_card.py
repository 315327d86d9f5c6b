"""Hidden states between two processes on one card: a copy within its memory, and no host's."""

import logging
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed import TCPStore

logger = logging.getLogger(__name__)

# Plain numbers and bytes: what carries them need not pickle.
SlotHandle = list[int | bytes | bool | str]

_UPSTREAM = 0
_PROBE = range(256)


class Slot(Protocol):
    """Memory that both ends of an edge hold, for one micro-batch.

    Attributes:
        memory: Its bytes.
    """

    memory: torch.Tensor

    def note_written(self) -> None:
        """Mark the end of what the upstream end has begun to write."""

    def wait_until_written(self) -> None:
        """Let what the downstream end does next begin after the latest mark."""


class Card(Protocol):
    """What two processes share.

    Attributes:
        device: How this process calls it.
        identity: The same for processes that share it, and for no others.
    """

    device: torch.device
    identity: str

    def new_slot(self, num_bytes: int) -> Slot:
        """Take memory."""

    def share_slot(self, slot: Slot) -> SlotHandle:
        """Tell how another process comes to hold a slot of this one; anew for each."""

    def open_slot(self, handle: SlotHandle) -> Slot:
        """Hold what another process has taken.

        Raises:
            RuntimeError: The card's driver refuses.
        """


class SlotPool:
    """This process's slots on a card, which outlive the edges that use them.

    If a process dies that holds a slot, its memory is not freed before this process ends, too. So
    it goes to the next edge.

    Args:
        card: Where they lie.

    Attributes:
        card: The same.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self._free: list[Slot] = []

    def take(self, num_bytes: int) -> Slot:
        """A slot that holds as many bytes, the smallest of those that are free if one does."""
        self._free.sort(key=lambda slot: slot.memory.nbytes)
        for index, slot in enumerate(self._free):
            if slot.memory.nbytes >= num_bytes:
                return self._free.pop(index)
        return self.card.new_slot(1 << (num_bytes - 1).bit_length())

    def give_back(self, slot: Slot) -> None:
        """Let another edge, or a larger micro-batch, have a slot that was taken."""
        self._free.append(slot)


@dataclass(frozen=True, slots=True)
class _CudaSlot:
    memory: torch.Tensor
    written: torch.cuda.Event

    def note_written(self) -> None:
        self.written.record()

    def wait_until_written(self) -> None:
        self.written.wait()


class CudaCard:
    """The current GPU, by CUDA IPC."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.identity = str(torch.cuda.get_device_properties(self.device).uuid)

    def new_slot(self, num_bytes: int) -> _CudaSlot:
        """See `Card`."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return _CudaSlot(memory, torch.cuda.Event(interprocess=True))

    def share_slot(self, slot: _CudaSlot) -> SlotHandle:
        """See `Card`."""
        # The first of the fields is this process's number of the device.
        fields = slot.memory.untyped_storage()._share_cuda_()[1:]
        return [slot.written.ipc_handle(), *fields]

    def open_slot(self, handle: SlotHandle) -> Slot:
        """See `Card`."""
        event_handle, *fields = handle
        written = torch.cuda.Event.from_ipc_handle(self.device, event_handle)
        storage = torch.UntypedStorage._new_shared_cuda(self.device.index, *fields)  # noqa: SLF001
        memory = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        return _CudaSlot(memory, written)


class SharedCardChannel:
    """One end of an edge within a card; an `ActivationChannel`.

    The upstream end writes to its slots in turn. It comes back to one when as many later
    micro-batches were submitted as there are slots, and the scheduler submits the last of these
    only when the pipeline is through with the first: so nothing has to tell that a slot was read.

    Args:
        pool: Of the card that the two ends share; the upstream end takes its slots from it.
        num_slots: At least the number of micro-batches that can be in flight.
    """

    def __init__(self, pool: SlotPool, num_slots: int) -> None:
        self._pool = pool
        self._taken: list[Slot | None] = [None] * num_slots  # at the upstream end
        self._opened: list[Slot | None] = [None] * num_slots  # at the downstream end
        self._next = 0

    def probe(self) -> None:
        """`meet_on_card` has seen that data passes."""

    def send(self, batch_id: int, hidden: torch.Tensor) -> list[object]:
        """Copy to the next slot; returns whose it is, which slot, and where, if that is new."""
        index, self._next = self._next, (self._next + 1) % len(self._taken)
        slot, handle = self._taken[index], None
        if slot is None or slot.memory.nbytes < hidden.nbytes:
            larger = self._pool.take(hidden.nbytes)
            handle = self._pool.card.share_slot(larger)
            if slot is not None:
                self._pool.give_back(slot)
            slot = self._taken[index] = larger
        _view(slot, hidden).copy_(hidden)
        slot.note_written()
        return [batch_id, index, handle]

    def receive(self, batch_id: int, carried: Sequence[object], hidden: torch.Tensor) -> None:
        """Copy from the slot, on the current stream."""
        sent_id, index, handle = carried
        if sent_id != batch_id:
            raise RuntimeError(f"the hidden states of micro-batch {sent_id} came instead")
        if handle is not None:
            self._opened[index] = self._pool.card.open_slot(handle)
        slot = self._opened[index]
        slot.wait_until_written()
        hidden.copy_(_view(slot, hidden))

    def abort(self) -> None:
        """Nothing waits here: what is carried was written before it was sent."""

    def close(self) -> None:
        """Let go of the memory."""
        for slot in self._taken:
            if slot is not None:
                self._pool.give_back(slot)
        self._taken = [None] * len(self._taken)
        self._opened = [None] * len(self._opened)


def meet_on_card(
    pool: SlotPool, store: TCPStore, end: int, num_slots: int
) -> SharedCardChannel | None:
    """Become one end of an edge within a card, if both ends share it and it lets them.

    Args:
        pool: This process's.
        store: The edge's rendezvous.
        end: 0 sends, 1 receives.
        num_slots: See `SharedCardChannel`.

    Returns:
        None at both ends, if hidden states have to travel otherwise.
    """
    card = pool.card
    store.set(f"card of {end}", card.identity)
    if store.get(f"card of {1 - end}").decode() != card.identity:
        return None
    channel = SharedCardChannel(pool, num_slots)
    expected = torch.tensor(_PROBE, dtype=torch.uint8, device=card.device)
    why = _offer(channel, store, expected) if end == _UPSTREAM else _try(channel, store, expected)
    if why:
        channel.close()
        logger.warning("stages of one card exchange hidden states over the host: %s", why)
        return None
    return channel


def _offer(channel: SharedCardChannel, store: TCPStore, expected: torch.Tensor) -> str:
    """Send the probe; returns why it does not work, if so."""
    try:
        carried: object = channel.send(0, expected)
    except RuntimeError as error:
        carried = _spell(error)
    store.set("probe", repr(carried))
    return store.get("verdict").decode()


def _try(channel: SharedCardChannel, store: TCPStore, expected: torch.Tensor) -> str:
    """Receive the probe; returns why it does not work, if so."""
    carried = literal_eval(store.get("probe").decode())
    why = carried if isinstance(carried, str) else _first_fault(channel, carried, expected)
    store.set("verdict", why)
    return why


def _first_fault(channel: SharedCardChannel, carried: list[object], expected: torch.Tensor) -> str:
    received = torch.zeros_like(expected)
    try:
        channel.receive(0, carried, received)
        return "" if torch.equal(received, expected) else "other bytes came than were sent"
    except RuntimeError as error:
        return _spell(error)


def _spell(error: RuntimeError) -> str:
    """Never empty, which would mean that all is well."""
    return str(error) or type(error).__name__


def _view(slot: Slot, hidden: torch.Tensor) -> torch.Tensor:
    """The slot's memory as a tensor of that shape and type."""
    return slot.memory[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)
