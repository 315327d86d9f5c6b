"""Sequences that share a prompt's blocks, and copy its last one, say what each says alone."""

import asyncio
from collections.abc import Sequence

import pytest

from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import MAX_TOKENS
from tests.numerics.serving import poison_kv_cache

BLOCK_SIZE = 4
MAX_BLOCKS = 8  # of one sequence
NUM_TARGETS = 2  # of each source
# The last block of a prompt: the third and not full, full, the only one, of a single token.
PROMPTS = [list(range(3 + length, 3 + 2 * length)) for length in (11, 12, 3, 17)]


class Sample:
    """A sequence that draws by a seed of its own, in blocks of its own but for those it shares.

    Attributes:
        seq_id: Its id, and its seed.
        output: Its tokens so far.
        copies: What must be copied before it can compute its last prompt token.
    """

    def __init__(self, seq_id: int, prompt: list[int], source: "Sample | None" = None) -> None:
        self.seq_id = seq_id
        self.output: list[int] = []
        self.copies: list[tuple[int, int]] = []
        self._prompt = prompt
        self._table = [seq_id * MAX_BLOCKS + index for index in range(MAX_BLOCKS)]
        if source is not None:
            last = (len(prompt) - 1) // BLOCK_SIZE
            self._table[:last] = source._table[:last]
            self.copies = [(source._table[last], self._table[last])]

    def chunk(self, start: int, end: int) -> ScheduledSequence:
        tokens = [*self._prompt, *self.output]
        draw = SamplingParams(temperature=2, seed=self.seq_id)
        return ScheduledSequence(
            seq_id=self.seq_id,
            epoch=0,
            start=start,
            token_ids=tuple(tokens[start:end]),
            block_table=tuple(self._table[: -(-end // BLOCK_SIZE)]),
            sampling=draw if end == len(tokens) else None,
        )

    def first_half(self) -> ScheduledSequence:
        return self.chunk(0, len(self._prompt) // 2)

    def second_half(self) -> ScheduledSequence:
        return self.chunk(len(self._prompt) // 2, len(self._prompt))

    def whole(self) -> ScheduledSequence:
        return self.chunk(0, len(self._prompt))

    def last_token(self) -> ScheduledSequence:
        length = len(self._prompt) + len(self.output)
        return self.chunk(length - 1, length)


def make_samples(*, are_shared: bool) -> tuple[list[Sample], list[Sample]]:
    """One source for each prompt, and its targets, which share no block unless `are_shared`."""
    sources = [Sample(seq_id, prompt) for seq_id, prompt in enumerate(PROMPTS)]
    targets = [
        Sample(len(PROMPTS) * (1 + index) + seq_id, prompt, source if are_shared else None)
        for index in range(NUM_TARGETS)
        for seq_id, (prompt, source) in enumerate(zip(PROMPTS, sources, strict=True))
    ]
    return sources, targets


class Runner:
    """Runs micro-batches one by one and hands out the tokens."""

    def __init__(self, pipeline: LocalPipeline, samples: list[Sample]) -> None:
        poison_kv_cache(pipeline)
        self._pipeline = pipeline
        self._by_id = {sample.seq_id: sample for sample in samples}

    def run(self, *chunks: ScheduledSequence, copied_for: Sequence[Sample] = ()) -> None:
        copies = tuple(copy for sample in copied_for for copy in sample.copies)
        self._pipeline.submit(MicroBatch(batch_id=0, sequences=chunks, block_copies=copies))
        tokens = iter(asyncio.run(self._pipeline.next_result()).token_ids)
        for chunk in chunks:
            if chunk.sampling is not None:
                self._by_id[chunk.seq_id].output.append(next(tokens))

    def decode(self) -> list[list[int]]:
        """Go on to the last token; returns the tokens of every sample."""
        samples = self._by_id.values()
        while short := [sample for sample in samples if len(sample.output) < MAX_TOKENS]:
            self.run(*(sample.last_token() for sample in short))
        return [sample.output for sample in samples]


def copy_in_a_later_micro_batch(runner, sources, targets):
    runner.run(*(source.whole() for source in sources))
    runner.run(*(source.last_token() for source in sources))
    runner.run(*(target.last_token() for target in targets), copied_for=targets)


def copy_while_the_source_is_written(runner, sources, targets):
    chunks = [source.whole() for source in sources]
    runner.run(*chunks, *(target.last_token() for target in targets), copied_for=targets)


def copy_while_the_source_ends_its_prompt(runner, sources, targets):
    runner.run(*(source.first_half() for source in sources))
    chunks = [source.second_half() for source in sources]
    runner.run(*chunks, *(target.last_token() for target in targets), copied_for=targets)


def copy_while_the_source_decodes(runner, sources, targets):
    runner.run(*(source.whole() for source in sources))
    everyone = [*sources, *targets]
    runner.run(*(sample.last_token() for sample in everyone), copied_for=targets)


def copy_at_different_times(runner, sources, targets):
    early, late = targets[: len(sources)], targets[len(sources) :]
    copy_while_the_source_is_written(runner, sources, early)
    everyone = [*sources, *early, *late]
    runner.run(*(sample.last_token() for sample in everyone), copied_for=late)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    "begin",
    [
        copy_in_a_later_micro_batch,
        copy_while_the_source_is_written,
        copy_while_the_source_ends_its_prompt,
        copy_while_the_source_decodes,
        copy_at_different_times,
    ],
    ids=lambda begin: begin.__name__,
)
def test_tokens_equal_those_without_sharing(name, num_stages, begin, local_pipeline):
    pipeline = local_pipeline(name, num_stages)
    alone = [sample for samples in make_samples(are_shared=False) for sample in samples]
    runner = Runner(pipeline, alone)
    for sample in alone:
        runner.run(sample.whole())
    expected = runner.decode()
    assert len(set(map(tuple, expected))) == len(expected), "some samples never parted"

    sources, targets = make_samples(are_shared=True)
    runner = Runner(pipeline, [*sources, *targets])
    begin(runner, sources, targets)
    assert runner.decode() == expected
