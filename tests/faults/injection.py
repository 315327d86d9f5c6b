"""A stage that does harm, once, to what it sends or to the calls that reach it."""

import contextlib
import time
from pathlib import Path

import ray

from gllm_ray.stages import step_messages
from gllm_ray.stages.actor import StageActor
from gllm_ray.stages.inbox import Outbox
from gllm_ray.stages.transport import MAX_CARRIED_BYTES

DELAY_S = 0.8


class InjectingChannel:
    """An `ActivationChannel` that mistreats a message when a fault for it is armed.

    Args:
        channel: The one that carries the messages.
        take_fault: Given the size of a message, returns its fault, once.
    """

    def __init__(self, channel, take_fault):
        self._channel = channel
        self._take_fault = take_fault
        self._latest = None  # the small message before
        self._held = None  # a message that the next one overtakes

    def send(self, batch_id, hidden):
        size = "large" if hidden.nbytes > MAX_CARRIED_BYTES else "small"
        fault, held, self._held = self._take_fault(size), self._held, None
        if fault == "reorder":
            self._held = batch_id, hidden
        if fault in ("drop", "reorder"):
            return None
        if fault == "delay":
            time.sleep(DELAY_S)
        if fault == "duplicate":
            self._channel.send(batch_id, hidden)
        carried = self._channel.send(batch_id, hidden)
        if held is not None:
            self._channel.send(*held)
        if fault == "repeat":
            return self._latest
        self._latest = carried or self._latest
        return carried

    def receive(self, batch_id, carried, hidden):
        self._channel.receive(batch_id, carried, hidden)

    def abort(self):
        self._channel.abort()

    def close(self):
        self._channel.close()


def injecting_outbox(take_fault):
    """The class of an `Outbox` that mistreats an answer when `take_fault()` returns a fault."""

    class InjectingOutbox(Outbox):
        _held = None  # an answer that the next message overtakes

        def write(self, message):
            held, self._held = self._held, None
            fault = take_fault() if message[0] == step_messages.ANSWER else None
            if fault == "delay":
                time.sleep(DELAY_S)
            if fault == "reorder":
                self._held = message
            if fault not in ("drop", "reorder"):
                super().write(message)
            if fault == "duplicate":
                super().write(message)
            if held is not None:
                super().write(held)

    return InjectingOutbox


def faulty_stage_actor(directory: Path):
    """The actor class of stages that look into a directory for the fault to make."""

    class FaultyStage(StageActor.__ray_metadata__.modified_class):
        def __init__(self, config, stage_id):
            super().__init__(config, stage_id)
            self._run_step = self._stage.step
            self._stage.step = self._step
            step_messages.Outbox = injecting_outbox(lambda: self._take("answer"))

        def connect(self, epoch, previous):
            inbox = super().connect(epoch, previous)
            if self._stage._outbound is not None:
                self._stage._outbound = InjectingChannel(self._stage._outbound, self._take)
            return inbox

        def _step(self, epoch, metadata, previous):
            fault = self._take("call")
            if fault == "drop":
                time.sleep(3600)  # to the caller, and to who watches, a call that did not arrive
            if fault == "delay":
                time.sleep(DELAY_S)
            answer = self._run_step(epoch, metadata, previous)
            return self._run_step(epoch, metadata, previous) if fault == "duplicate" else answer

        def _take(self, target):
            """The fault that is armed for this stage, which then is not any more."""
            armed = directory / f"{self._stage._stage_id} {target}"
            with contextlib.suppress(FileNotFoundError):
                fault = armed.read_text()
                armed.unlink()
                return fault

    return ray.remote(
        max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"ctl": 2}
    )(FaultyStage)


def arm(directory: Path, stage_id: int, target: str, fault: str) -> None:
    """Let a stage make a fault at the next message or call of a kind."""
    new = directory / "new"
    new.write_text(fault)
    new.rename(directory / f"{stage_id} {target}")
