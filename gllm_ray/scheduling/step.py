"""One micro-batch from its forming to its commit."""

from dataclasses import dataclass, field
from typing import NamedTuple

from gllm_ray.messages import ScheduledSequence, TokenEvent
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.sequence import Sequence


@dataclass(slots=True)
class Step:
    """What goes into a micro-batch; decodes are added first, then prefill chunks.

    Attributes:
        items: The shares of the sequences, in the order of adding.
        sampling: The sequences that get a token, in the order of their tokens.
        others: Those whose chunk does not end their prompt.
        num_decodes: See `StepLoad`.
        num_context_tokens: See `StepLoad`.
        num_prefill_tokens: See `StepLoad`.
        num_attention_pairs: See `StepLoad`.
        num_ending_tokens: Tokens of the sequences whose prompt ends in it, and that decode next.
        scored: The sequences of `scored_chunks`.
        scored_chunks: See `MicroBatch`.
    """

    items: list[ScheduledSequence] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    others: list[Sequence] = field(default_factory=list)
    num_decodes: int = 0
    num_context_tokens: int = 0
    num_prefill_tokens: int = 0
    num_attention_pairs: int = 0
    num_ending_tokens: int = 0
    scored: list[Sequence] = field(default_factory=list)
    scored_chunks: list[tuple[int, int, int | None]] = field(default_factory=list)

    def add_chunk(self, sequence: Sequence, item: ScheduledSequence) -> None:
        """Put a prefill chunk of a sequence in."""
        num_tokens = len(item.token_ids)
        num_likely = sequence.request.num_prompt_logprobs
        if num_likely is not None and sequence.prompt_logprobs is not None:
            following = sequence.token_ids[item.end] if item.sampling is None else None
            self.scored.append(sequence)
            self.scored_chunks.append((len(self.items), num_likely, following))
        self.items.append(item)
        self.num_prefill_tokens += num_tokens
        self.num_attention_pairs += num_tokens * item.end
        if item.sampling is None:
            self.others.append(sequence)
        else:
            self.sampling.append(sequence)
            self.num_ending_tokens += sequence.num_tokens

    def note_prompt_logprobs(self, told: tuple[bytes, ...]) -> None:
        """Keep what the last stage told of prompts until their first token comes."""
        for sequence, logprobs in zip(self.scored, told, strict=True):
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs.append(logprobs)

    def tell_prompts(self, events: list[TokenEvent]) -> None:
        """Let the first token of each request tell of its prompt.

        That is what the prefix cache had of it, and its log probabilities. No later one does, so
        whoever goes on with some output need not know what was told.

        Args:
            events: What came of the step, last of the sequences whose prompt ends in it.
        """
        ending = self.sampling[self.num_decodes :]
        begun = {s.request_id: s for s in ending if s.num_output_tokens == 1}
        for index in range(max(0, len(events) - len(ending)), len(events)):
            event = events[index]
            if event.token_id is not None and event.request_id in begun:
                sequence = begun[event.request_id]
                told, sequence.prompt_logprobs = sequence.prompt_logprobs, None
                logprobs = None if told is None else b"".join(told)
                events[index] = TokenEvent(*event[:-2], sequence.num_cached_tokens, logprobs)

    def load(self) -> StepLoad:
        """What the micro-batch makes each stage compute."""
        return StepLoad(
            self.num_decodes,
            self.num_context_tokens,
            self.num_prefill_tokens,
            self.num_attention_pairs,
        )


class Requeued(NamedTuple):
    """What came of beginning again with every sequence.

    Attributes:
        events: The ends of those that were being aborted.
        lost: The requests whose work in flight was lost, and the output tokens of each so far.
    """

    events: list[TokenEvent]
    lost: dict[str, int]
