"""A stage among its neighbours: order, epochs and transport around a `StageWorker`."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import ray
import torch

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError, GllmRayError, PipelineError
from gllm_ray.messages import (
    EdgeAddress,
    InboxAddress,
    MicroBatch,
    StageInfo,
    StepInterval,
    StepUnderWay,
)
from gllm_ray.stages.inbox import Inbox, Outbox
from gllm_ray.stages.metadata import MetadataDecoder
from gllm_ray.stages.step_messages import STOP, StepFailure, StepQueue, run_steps
from gllm_ray.stages.stopwatch import Stopwatch, event_type
from gllm_ray.stages.transport import (
    DOWNSTREAM,
    UPSTREAM,
    ActivationChannel,
    CarriedChannel,
    find_edge,
    host_edge,
    join_edge,
    resolve_transport,
)
from gllm_ray.stages.worker import StageWorker

logger = logging.getLogger(__name__)

# Lists, because Ray packs a list of numbers several times faster than it pickles tuples.
StepAnswer = list[object]


class Stage:
    """Holds one stage of a pipeline; runs in an actor.

    Args:
        config: The replica's configuration.
        stage_id: Position in the pipeline, from 0.
    """

    def __init__(self, config: ServiceConfig, stage_id: int) -> None:
        self._config = config
        self._stage_id = stage_id
        self._host = ray.util.get_node_ip_address()
        self._transport = resolve_transport(config.pipeline)
        self._store: torch.distributed.TCPStore | None = None
        self._inbound: ActivationChannel | None = None
        self._outbound: ActivationChannel | None = None
        self._inbox: Inbox | None = None
        self._epoch: int | None = None
        self._last_batch_id = self._latest_computed = -1
        self._decoder = MetadataDecoder()
        # Id and tokens of the micro-batch, and when it began.
        self._under_way: tuple[int, int, float] | None = None
        self._stopwatch = self._new_stopwatch()

    def load(self) -> StageInfo:
        """Build the shard and read its weights.

        Raises:
            ConfigError: The model cannot be served as configured.
        """
        with self._outermost("load"):
            self._worker = StageWorker(self._config, self._stage_id)
            return self._worker.load()

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Take the memory of `num_blocks` KV blocks."""
        with self._outermost("allocate its KV cache"):
            self._worker.allocate_kv_cache(num_blocks)

    def open_edge(self) -> EdgeAddress | None:
        """Open a new rendezvous for the edge to the next stage.

        Returns:
            Its address for the next stage's `connect`, or None if the transport needs none.
        """
        if self._transport == "object_store":
            return None
        with self._outermost("open its edge"):
            self._store = host_edge(self._host)
            return EdgeAddress(self._host, self._store.port)

    def leave_edges(self) -> None:
        """Refuse steps, and end the one that waits for a neighbour which may be gone.

        Called while another thread runs that step, or waits for one in `run`.
        """
        self._epoch = None
        if (inbox := self._inbox) is not None:
            outbox = Outbox(inbox.address)
            outbox.write([STOP])
            outbox.close()
        edges = [edge for edge in (self._inbound, self._outbound) if edge is not None]
        # At once, because the abort of one communicator may wait for the kernels of the other.
        with ThreadPoolExecutor(max_workers=2) as threads:
            list(threads.map(lambda edge: edge.abort(), edges))

    def connect(self, epoch: int, previous: EdgeAddress | None) -> InboxAddress | None:
        """Join this stage's edges and accept the steps of `epoch`, and of no other.

        Both ends of an edge wait for each other, so all stages connect at once.

        Args:
            epoch: Raised by the owner each time the pipeline is put together anew.
            previous: What the previous stage's `open_edge` returned; None for the first stage.

        Returns:
            Where `run` is going to read; None: steps come as calls.
        """
        with self._outermost("connect to its neighbours"):
            self._under_way = -1, 0, time.monotonic()
            self._close_inbound()
            if self._outbound is not None:
                self._outbound.close()
                self._outbound = None
            self._join_edges(previous)
            self._last_batch_id = self._latest_computed = -1
            self._decoder = MetadataDecoder()
            self._stopwatch = self._new_stopwatch()
            self._worker.forget_sequences()
            if self._inbox is not None:
                self._inbox.close()
            is_direct = self._config.pipeline.control_plane == "direct"
            self._inbox = Inbox(self._host) if is_direct else None
            self._epoch, self._under_way = epoch, None
            return None if self._inbox is None else self._inbox.address

    def run(self, epoch: int, onward: Sequence[InboxAddress]) -> StepFailure | None:
        """Take steps from the inbox until one fails or someone says stop.

        Args:
            epoch: As for `step`.
            onward: Who is told what came of each step; see `run_steps`.

        Returns:
            Why a step failed, which was told onward, too; None: it was said to stop.

        Raises:
            PipelineError: The epoch is not the connected one, or ended, or a message was lost.
        """
        failure = None
        if epoch == self._epoch:
            max_in_flight = self._config.pipeline.most_in_flight
            steps = StepQueue(
                self._inbox,
                is_connected=lambda: self._epoch == epoch,
                max_in_flight=max_in_flight if self._worker.is_first else None,
            )
            with self._outermost("take its steps"):
                failure = run_steps(self._stage_id, steps, partial(self.step, epoch), onward)
            if failure is not None:
                self._await_receives()
            self._close_inbound()  # else the previous stage might wait for receives
        if failure is None and epoch != self._epoch:
            raise self._refusal(epoch)
        return failure

    def step(self, epoch: int, metadata: bytes, previous: StepAnswer | None) -> StepAnswer:
        """Run one micro-batch through this stage.

        Args:
            epoch: The epoch the caller believes the pipeline is in.
            metadata: The `MicroBatch`, as the caller's `MetadataEncoder` encoded it.
            previous: The answer of the previous stage's step: orders the two, carries its failure,
                and on the object store its hidden states. For the first stage the last stage's
                answer to the micro-batch that this one continues; None if it continues none.

        Returns:
            The fields of `SampledTokens` on the last stage, else what the next stage's `receive`
            needs; and the fields of every `StageTime` that became known on the way to here.

        Raises:
            PipelineError: The epoch is not the connected one, or the step failed. After a failure
                every step is refused until the stage is connected again.
        """
        if epoch != self._epoch:
            raise self._refusal(epoch)
        with self._outermost("read a micro-batch"):
            batch = self._decoder.decode(metadata)
        with self._outermost(f"run micro-batch {batch.batch_id}"):
            if batch.batch_id <= self._last_batch_id:
                raise PipelineError(
                    f"stage {self._stage_id} got micro-batch {batch.batch_id} after "
                    f"{self._last_batch_id}"
                )
            self._last_batch_id = batch.batch_id
            self._under_way = batch.batch_id, batch.num_tokens, time.monotonic()
            carried, times = previous or ([()], [])
            if self._worker.is_first:
                hidden, sampled = None, carried[0]
                times = []  # the scheduler gets those of the other micro-batch with its tokens
            else:
                hidden, sampled = self._receive(batch, carried), ()
            with self._stopwatch.measure(batch.batch_id):
                output = self._worker.execute(batch, hidden, sampled)
            times += map(list, self._stopwatch.take())
            if self._worker.is_last:
                output = [list(field) for field in output]
            else:
                output = self._outbound.send(batch.batch_id, output)
            self._under_way = None
            self._latest_computed = batch.batch_id
            return [output, times]

    def settle(self) -> None:
        """Return after the steps before, and after all that they began on a device.

        The stages before the last one do not wait for their GPU, so that one which hangs shows here
        and not in their steps.
        """
        if self._worker.device.type == "cuda":
            with self._outermost("end its steps"):
                # Under way, because that may take as long as a step.
                self._under_way = self._last_batch_id, 0, time.monotonic()
                torch.cuda.synchronize(self._worker.device)
                self._under_way = None

    def step_under_way(self) -> StepUnderWay | None:
        """What the stage does now, the time in which it waits for its neighbours included."""
        if (under_way := self._under_way) is None:
            return None
        batch_id, num_tokens, start_s = under_way
        return StepUnderWay(
            batch_id=batch_id, num_tokens=num_tokens, elapsed_s=time.monotonic() - start_s
        )

    def latest_computed(self) -> int:
        """Id of the latest micro-batch that this stage has computed in this epoch; -1: none."""
        return self._latest_computed

    def intervals(self) -> tuple[StepInterval, ...]:
        """When this stage computed its latest micro-batches, oldest first."""
        return self._stopwatch.intervals()

    def _refusal(self, epoch: int) -> PipelineError:
        return PipelineError(
            f"stage {self._stage_id} refuses a micro-batch of epoch {epoch}: it is connected for "
            f"epoch {self._epoch}"
        )

    def _join_edges(self, previous: EdgeAddress | None) -> None:
        """Join every other edge of the chain at once, and then the others, however long it is."""
        if self._transport == "object_store":
            self._inbound = self._outbound = CarriedChannel()
            return
        ends = UPSTREAM, DOWNSTREAM
        for end in ends if self._stage_id % 2 == 0 else reversed(ends):
            # A channel is probed where `leave_edges` finds it: NCCL may wait for ever.
            if end == UPSTREAM and self._store is not None:
                self._outbound = self._join(self._store, UPSTREAM)
                self._outbound.probe()
            if end == DOWNSTREAM and previous is not None:
                self._inbound = self._join(find_edge(previous), DOWNSTREAM)
                self._inbound.probe()

    def _join(self, store: torch.distributed.TCPStore, end: int) -> ActivationChannel:
        max_in_flight = self._config.pipeline.most_in_flight
        return join_edge(self._transport, store, end, self._host, max_in_flight)

    def _new_stopwatch(self) -> Stopwatch:
        return Stopwatch(self._stage_id, event_type(self._config.pipeline.device))

    def _receive(self, batch: MicroBatch, carried: object) -> torch.Tensor:
        """The previous stage's output, [batch.num_tokens, hidden_size]."""
        worker = self._worker
        hidden = torch.empty(
            batch.num_tokens, worker.hidden_size, dtype=worker.dtype, device=worker.device
        )
        self._inbound.receive(batch.batch_id, carried, hidden)
        return hidden

    @contextmanager
    def _outermost(self, action: str) -> Iterator[None]:
        """Name this stage in whatever goes wrong, and refuse steps from then on."""
        try:
            yield
        except ConfigError as error:
            self._break()
            raise ConfigError(f"stage {self._stage_id} on {self._host}: {error}") from error
        except GllmRayError:
            self._break()
            raise
        except Exception as error:
            self._break()
            logger.exception("stage %d failed to %s", self._stage_id, action)
            raise PipelineError(
                f"stage {self._stage_id} failed to {action}: {type(error).__name__}: {error}"
            ) from error

    def _break(self) -> None:
        self._epoch = self._under_way = None
        # Else the previous stage would wait for receives that never come. The other edge stays:
        # the next stage may still have to receive earlier micro-batches.
        self._await_receives()
        self._close_inbound()

    def _close_inbound(self) -> None:
        if self._inbound is not None:
            self._inbound.close()
            self._inbound = None

    def _await_receives(self) -> None:
        """Wait for what the steps before a failed one receive on a device.

        To close NCCL's edge ends that without its data, and the next stages would go on with it.
        """
        if self._inbound is not None and self._worker.device.type == "cuda":
            # Under way, because that may take as long as a step.
            self._under_way = self._last_batch_id, 0, time.monotonic()
            with suppress(RuntimeError):  # a device that is broken has told so before
                torch.cuda.current_stream(self._worker.device).synchronize()
            self._under_way = None
