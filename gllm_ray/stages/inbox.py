"""Messages between the processes of a pipeline: many may write to an inbox, and one reads it.

Who writes has to know the inbox's public key, which travels by Ray alone. What is written is
encrypted (CurveZMQ) and spelled in MessagePack, so nobody else can write, and nothing that is read
can run.
"""

from collections.abc import Sequence
from contextlib import suppress

import msgpack
import numpy as np
import zmq

from gllm_ray.messages import InboxAddress

Message = list[object]

# How long a writer that closes goes on sending what is left.
_LINGER_MS = 1000
# How long a reader waits at a time.
_PATIENCE_MS = 1000


class Inbox:
    """The end that reads, over TCP; all methods but `address` belong to one thread at a time.

    Args:
        host: Address of this node in the cluster.

    Attributes:
        address: What a writer needs.
    """

    def __init__(self, host: str) -> None:
        self._socket = _new_socket(zmq.PULL)
        self._socket.rcvtimeo = _PATIENCE_MS
        public_key, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.bind(f"tcp://{_in_url(host)}:*")
        port = int(self._socket.last_endpoint.rpartition(b":")[2])
        self.address = InboxAddress(host, port, public_key)

    def fileno(self) -> int:
        """Becomes readable when messages come, after all of those before were read."""
        return self._socket.fileno()

    def read(self) -> Message | None:
        """Wait a second for a message."""
        return self._read(0)

    def read_if_any(self) -> Message | None:
        """A message, if one has come."""
        return self._read(zmq.NOBLOCK)

    def close(self) -> None:
        """Drop what was not read."""
        self._socket.close()

    def _read(self, flags: int) -> Message | None:
        try:
            return msgpack.unpackb(self._socket.recv(flags))
        except zmq.Again:
            return None


class Outbox:
    """The end that writes; it belongs to one thread at a time.

    Args:
        address: Of the inbox.
    """

    def __init__(self, address: InboxAddress) -> None:
        self._socket = _new_socket(zmq.PUSH)
        self._socket.sndhwm = 0  # unlimited, for what is in flight is bounded
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_serverkey = address.public_key
        self._socket.connect(f"tcp://{_in_url(address.host)}:{address.port}")

    def write(self, message: Sequence[object]) -> None:
        """Send a message of numbers, texts, bytes, arrays, and lists of those; never waits.

        What nobody reads any more is dropped.
        """
        with suppress(zmq.Again):
            self._socket.send(msgpack.packb(message, default=_bytes_of), zmq.NOBLOCK)

    def close(self) -> None:
        """Send what was written, in the background, and leave."""
        self._socket.close(linger=_LINGER_MS)


def _new_socket(kind: int) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(kind)
    socket.ipv6 = True
    return socket


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bytes_of(value: object) -> bytes:
    """Of an array the bytes alone: its reader knows type and shape."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} cannot be sent")
    return value.tobytes()
