"""Micro-batches of nothing but decodes, replayed from CUDA graphs.

A graph computes as many rows as it was captured with, at the addresses it was captured with. So a
micro-batch is filled up to the next size, and copied to where the graphs read. The rows added are
decodes at the first position of a reserved block, so that they change nothing else.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from gllm_ray.messages import MicroBatch, ScheduledSequence
from gllm_ray.model.inputs import PackedInputs, SequenceTables, pack

Forward = Callable[[PackedInputs, torch.Tensor | None], torch.Tensor]
# Makes of a function one that computes the same again, from and to the same addresses.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]

_POWERS = (1, 2, 4, 8, 16, 32)


def graph_sizes(max_decodes: int) -> tuple[int, ...]:
    """Powers of two to 32, its multiples, and the most decodes that a micro-batch may hold."""
    sizes = (*_POWERS, *range(2 * _POWERS[-1], max_decodes, _POWERS[-1]))
    return (*(size for size in sizes if size < max_decodes), max_decodes)


def cuda_capture() -> Capture:
    """What captures CUDA graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        function()  # compiles kernels and takes workspaces, which a graph cannot do
        torch.cuda.synchronize()
        with _refuse_waits():  # of which a capture would be left half done
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    return capture


@contextmanager
def _refuse_waits() -> Iterator[None]:
    """Within it, what waits for the device raises a `RuntimeError`."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSetting:
    """What graphs of decodes are made for.

    Attributes:
        sizes: Rows of the graphs, ascending.
        max_blocks: Blocks of the longest context.
        block_size: Tokens of a block.
        reserved_block: Which the rows that are added write to and read.
        hidden: `[last size, hidden_size]`, where graphs read what the previous stage sent; None on
            the first stage.
        is_last: Whether the stage computes logits.
        device: Where it computes.
    """

    sizes: tuple[int, ...]
    max_blocks: int
    block_size: int
    reserved_block: int
    hidden: torch.Tensor | None
    is_last: bool
    device: torch.device


class DecodeGraphs:
    """One graph of a stage's forward pass for each size of a micro-batch of decodes.

    Args:
        forward: Hidden states of the rows, or the logits of `sample_rows`.
        capture: Called once for each size, here.
        setting: What the graphs are made for.

    Raises:
        RuntimeError: The forward pass waits for the device, or there is no memory left.
    """

    def __init__(self, forward: Forward, capture: Capture, setting: DecodeSetting) -> None:
        self._setting = setting
        self._padding = ScheduledSequence(
            seq_id=-1,
            epoch=0,
            start=0,
            token_ids=(0,),
            block_table=(setting.reserved_block,),
            sampling=None,
        )
        inputs = self._pack((self._padding,) * setting.sizes[-1])
        block_tables = inputs.tables.block_tables.repeat(1, setting.max_blocks)
        inputs = replace(inputs, tables=inputs.tables._replace(block_tables=block_tables))
        self._inputs = {size: _first_rows(inputs, size) for size in setting.sizes}
        # Of all graphs, so that each takes no memory for its own.
        self._output = torch.empty_like(forward(self._inputs[setting.sizes[-1]], setting.hidden))
        # The largest first, so that the memory it takes is enough for the others.
        self._replays = {
            size: capture(self._step(forward, size)) for size in reversed(setting.sizes)
        }

    def takes(self, batch: MicroBatch) -> bool:
        """Whether `run` can compute this micro-batch."""
        num_rows = len(batch.sequences)
        is_decodes = batch.num_tokens == num_rows and not batch.block_copies
        return is_decodes and 0 < num_rows <= self._setting.sizes[-1]

    def run(
        self, batch: MicroBatch, hidden: torch.Tensor | None, sampled: Sequence[int]
    ) -> torch.Tensor:
        """Compute a micro-batch of decodes.

        Args:
            batch: The micro-batch.
            hidden: `[num_tokens, hidden_size]` of the previous stage, None on the first.
            sampled: See `pack`.

        Returns:
            Hidden states `[num_tokens, hidden_size]`, or the logits of the rows to draw from.
        """
        num_rows = len(batch.sequences)
        sizes = self._setting.sizes
        size = sizes[bisect_left(sizes, num_rows)]
        packed = self._pack(batch.sequences + (self._padding,) * (size - num_rows), sampled)
        _copy(packed, self._inputs[size])
        if hidden is not None:
            self._setting.hidden[:num_rows] = hidden
        output = self._replays[size]()
        # The next replay may write to the same memory before anybody has read this.
        return output[packed.sample_rows] if self._setting.is_last else output[:num_rows].clone()

    def _pack(
        self, sequences: tuple[ScheduledSequence, ...], sampled: Sequence[int] = ()
    ) -> PackedInputs:
        batch = MicroBatch(batch_id=0, sequences=sequences)
        return pack(batch, self._setting.block_size, self._setting.device, sampled)

    def _step(self, forward: Forward, size: int) -> Callable[[], torch.Tensor]:
        hidden = self._setting.hidden
        if hidden is not None:
            hidden = hidden[:size]
        return lambda: self._output[:size].copy_(forward(self._inputs[size], hidden))


def _first_rows(inputs: PackedInputs, size: int) -> PackedInputs:
    """The same memory, as a micro-batch of `size` decodes, all of them drawn from."""
    row_starts, context_lens, block_tables = inputs.tables
    return replace(
        inputs,
        input_ids=inputs.input_ids[:, :size],
        position_ids=inputs.position_ids[:, :size],
        slot_mapping=inputs.slot_mapping[:size],
        row_starts=inputs.row_starts[: size + 1],
        context_lens=inputs.context_lens[:size],
        block_tables=inputs.block_tables[:size],
        tables=SequenceTables(row_starts[: size + 1], context_lens[:size], block_tables[:size]),
        drawn=torch.arange(size),
        sample_rows=row_starts[:size].long(),
    )


def _copy(source: PackedInputs, target: PackedInputs) -> None:
    """Copy what differs between micro-batches of as many decodes."""
    target.input_ids.copy_(source.input_ids)
    target.position_ids.copy_(source.position_ids)
    target.slot_mapping.copy_(source.slot_mapping)
    target.tables.context_lens.copy_(source.tables.context_lens)
    num_blocks = source.tables.block_tables.shape[1]
    target.tables.block_tables[:, :num_blocks] = source.tables.block_tables
