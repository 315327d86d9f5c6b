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
        sequences: Those of `batch.sequences`, in their order.
        load: What it makes each stage compute.
        num_samples: Tokens it samples.
    """

    batch: MicroBatch
    sequences: list[Sequence]
    load: StepLoad
    num_samples: int
