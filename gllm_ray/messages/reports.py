"""What stages and engines tell of themselves, and where they are found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """What a stage holds after it loaded its shard.

    Attributes:
        stage_id: Position in the pipeline, from 0.
        node: Host name of the process, for messages.
        first_layer: First decoder layer held.
        last_layer: One past the last decoder layer held.
        num_parameters: Parameters held, shared ones counted once.
        weight_bytes: Memory these parameters take.
        kv_block_bytes: Memory one KV block takes, over the stage's layers.
        max_kv_blocks: Blocks that fit into the memory left for the KV cache.
        attention: Which implementation runs, and why if a faster one does not; empty where nothing
            is computed.
        startup_s: How long each phase of the stage's start took, in order; they do not overlap.
    """

    stage_id: int
    node: str
    first_layer: int
    last_layer: int
    num_parameters: int
    weight_bytes: int
    kv_block_bytes: int
    max_kv_blocks: int
    attention: str = ""
    startup_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUnderWay:
    """What a stage does at this moment.

    Attributes:
        batch_id: The micro-batch that it computes, or whose end it waits for; -1: none, it joins
            its edges.
        num_tokens: The micro-batch's.
        elapsed_s: Since the stage began with it.
    """

    batch_id: int
    num_tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInterval:
    """When a stage computed a micro-batch, in seconds of the node's wall clock.

    It starts when the stage hands the work to its device, which may have earlier work to do.
    """

    batch_id: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How much an engine holds at this moment.

    Attributes:
        num_requests: Requests accepted and not ended.
        num_waiting_requests: Those of them that hold no KV blocks.
        num_waiting_tokens: Prompt tokens not yet scheduled, cached ones included.
        num_in_flight: Micro-batches submitted and not committed.
        kv_utilization: Share of the KV blocks in use, 0 to 1; cached ones are not.
        num_preemptions: Preemptions since the start.
        num_prefix_queried_tokens: Tokens of admitted prompts since the start, a preempted
            sequence's included, that were looked up in the prefix cache.
        num_prefix_hit_tokens: Those of them that were found there, and not computed again.
        num_prompt_tokens: Prompt tokens of the requests accepted since the start.
        drain_tokens_per_s: Prompt tokens scheduled a second while others had to wait, in the last
            10 s of that; 0: none had to.
        prefill_capacity_tokens_per_s: The same while half of the KV blocks were free, so that they
            waited for nothing but their prefill.
    """

    num_requests: int
    num_waiting_requests: int
    num_waiting_tokens: int
    num_in_flight: int
    kv_utilization: float
    num_preemptions: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_prompt_tokens: int
    drain_tokens_per_s: float
    prefill_capacity_tokens_per_s: float


class EdgeAddress(NamedTuple):
    """Where the upstream end of an edge waits for the downstream end."""

    host: str
    port: int


class InboxAddress(NamedTuple):
    """Where messages to a process of the pipeline go; see `stages.inbox.Inbox`.

    Attributes:
        host: Of its node.
        port: There.
        public_key: Whoever knows it may write.
    """

    host: str
    port: int
    public_key: bytes
