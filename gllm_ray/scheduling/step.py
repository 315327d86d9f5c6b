"""One micro-batch from its forming to its commit."""

from dataclasses import dataclass, field

from gllm_ray.messages import MicroBatch, ScheduledSequence
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.sequence import Sequence


@dataclass(slots=True)
class Step:
    """What goes into a micro-batch.

    Attributes:
        items: Decodes first, then prefill chunks.
        sequences: Those of the items, in their order.
        num_decodes: How many of them are decodes.
    """

    items: list[ScheduledSequence] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    num_decodes: int = 0

    def load(self) -> StepLoad:
        """What the micro-batch makes each stage compute."""
        decodes, chunks = self.items[: self.num_decodes], self.items[self.num_decodes :]
        return StepLoad(
            num_decodes=self.num_decodes,
            num_context_tokens=sum([item.start for item in decodes]) + self.num_decodes,
            num_prefill_tokens=sum([len(item.token_ids) for item in chunks]),
            num_attention_pairs=sum([len(item.token_ids) * item.end for item in chunks]),
        )


@dataclass(frozen=True, slots=True)
class InFlight:
    """A micro-batch that was submitted and not yet committed.

    Attributes:
        batch: As the stages got it.
        load: What it makes each stage compute.
        sampling: The sequences that get a token, in the order of their tokens.
        others: Those whose chunk does not end their prompt.
        num_ending_tokens: Tokens of the sequences whose prompt ends in it, and that decode next.
    """

    batch: MicroBatch
    load: StepLoad
    sampling: list[Sequence]
    others: list[Sequence]
    num_ending_tokens: int

    @classmethod
    def of(cls, batch: MicroBatch, step: Step) -> "InFlight":
        """The micro-batch that was made of a step."""
        chunks = list(zip(step.items, step.sequences, strict=True))[step.num_decodes :]
        ending = [sequence for item, sequence in chunks if item.sampling is not None]
        others = [sequence for item, sequence in chunks if item.sampling is None]
        sampling = step.sequences[: step.num_decodes] + ending
        num_ending_tokens = sum([sequence.num_tokens for sequence in ending])
        return cls(batch, step.load(), sampling, others, num_ending_tokens)
