"""The options of each scheduling policy: what `scheduler.policy` may hold."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gllm_ray.strict_schema import StrictModel


class TokenThrottlingConfig(StrictModel):
    """gLLM's token throttling; the symbols are the paper's.

    The defaults are the paper's equations and settings. Where the authors' code differs from them,
    an option says which holds; `one_stage` and `few_decodes` follow the code by default.

    Source: Guo et al., "gLLM", SC '25 (arXiv:2504.14775), Eqs. 1-4 and section 4.1;
        github.com/gty111/gLLM at 32065e0 (the paper's) and at bc91d98.
    """

    name: Literal["token_throttling"] = Field(
        default="token_throttling", description="The scheduling policy."
    )
    max_prefill_tokens: int = Field(
        default=2048, ge=1, description="Most prefill tokens of a micro-batch, #MaxP."
    )
    min_prefill_tokens: int = Field(
        default=32, ge=1, description="Fewest while prompts wait, #MinP; `floor` says of what."
    )
    prefill_iterations: int | None = Field(
        default=8,
        ge=1,
        description="Micro-batches over which waiting tokens are spread, #T; null: Eq. 2, no "
        "waiting term.",
    )
    kv_term: bool = Field(
        default=True,
        description="Prefill shrinks with the free share of the KV cache; false: Eq. 1.",
    )
    kv_threshold: Annotated[float, Field(ge=0, lt=1)] | Literal["adaptive"] = Field(
        default=0.05,
        description="Free share of the KV cache at which prefill stops, KVthresh; adaptive: by "
        "what running sequences may still need and by preemptions, as in gLLM since 2026.",
    )
    floor: Literal["budget", "waiting_term"] = Field(
        default="budget",
        description="What #MinP bounds: the result, as in Eq. 3, or, as in gLLM's code, only the "
        "waiting term, so that a full KV cache takes prefill to 0.",
    )
    one_stage: Literal["exempt", "throttled"] = Field(
        default="exempt",
        description="A pipeline of one stage has nothing to balance: exempt, as in gLLM's code, "
        "prefills #MaxP down to the threshold.",
    )
    few_decodes: Literal["one", "all"] = Field(
        default="one",
        description="Decodes of a micro-batch while fewer run than stages: one, as in gLLM since "
        "July 2025, so that they overlap, or all, as in the paper's code.",
    )
    count_prefills: bool = Field(
        default=False,
        description="Prefill chunks in flight count as running decodes, as in gLLM's code.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_prefill_tokens > self.max_prefill_tokens:
            raise ValueError(
                f"min_prefill_tokens={self.min_prefill_tokens}: must be <= "
                f"max_prefill_tokens={self.max_prefill_tokens}"
            )
        if self.floor == "waiting_term" and self.prefill_iterations is None:
            raise ValueError("floor='waiting_term': must be budget when prefill_iterations is null")
        return self

    def max_batch_tokens(self, max_decodes: int) -> int:
        """Most tokens of a micro-batch that holds at most `max_decodes` decodes."""
        return self.max_prefill_tokens + max_decodes


class ChunkedPrefillConfig(StrictModel):
    """Sarathi-Serve's stall-free scheduling.

    Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
        Sarathi-Serve", OSDI '24, Algorithm 3; the defaults are its code's, at 96f9911.
    """

    name: Literal["chunked_prefill"] = Field(
        default="chunked_prefill", description="The scheduling policy."
    )
    token_budget: int = Field(
        default=512,
        ge=1,
        description="Decodes and prefill tokens of a micro-batch together. Decodes alone may "
        "exceed it, up to max_decodes; prefill then waits.",
    )
    watermark: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the KV cache that admitting a prompt leaves free.",
    )
    tbt_target_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds between two tokens of a request: token_budget then shrinks to what is "
        "predicted to keep the tightest deadline; null: it is fixed.",
    )

    def max_batch_tokens(self, max_decodes: int) -> int:
        """Most tokens of a micro-batch that holds at most `max_decodes` decodes."""
        return max(self.token_budget, max_decodes)


class PrefillFirstConfig(StrictModel):
    """Separate batching: prompts go first, and a micro-batch holds whole prompts or decodes.

    It is a baseline. Decodes stand still whenever a prompt waits and fits.

    Source: vLLM 0; the budget is that of its comparison with "TD-Pipe", ICPP '25
        (arXiv:2506.10470).
    """

    name: Literal["prefill_first"] = Field(
        default="prefill_first", description="The scheduling policy."
    )
    token_budget: int = Field(
        default=4096,
        ge=1,
        description="Prompt tokens of a micro-batch, of whole prompts; a longer prompt is cut.",
    )
    watermark: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the KV cache that admitting a prompt leaves free.",
    )

    def max_batch_tokens(self, max_decodes: int) -> int:
        """Most tokens of a micro-batch that holds at most `max_decodes` decodes."""
        return max(self.token_budget, max_decodes)


class TemporalConfig(StrictModel):
    """TD-Pipe's temporal disaggregation: phases of prefill alone and of decode alone.

    It is for throughput. Decodes stand still for whole prefill phases, and a prompt that comes in a
    decode phase waits for its end.

    Source: "TD-Pipe", ICPP '25 (arXiv:2506.10470), and its code at c8c5316, which has the constants
        kv_limit, watermark and saturating_decodes.
    """

    name: Literal["temporal"] = Field(default="temporal", description="The scheduling policy.")
    prefill_tokens: int = Field(
        default=512,
        ge=1,
        description="Prompt tokens of a micro-batch in a prefill phase; best a multiple of 128 "
        "that saturates a stage.",
    )
    kv_limit: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the KV cache that the running sequences may need at their "
        "predicted peak; a prefill phase ends there.",
    )
    watermark: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Share of the KV cache that admitting a prompt leaves free.",
    )
    min_finished_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of its sequences that must have ended before a decode phase may end.",
    )
    saturating_decodes: int = Field(
        default=256,
        ge=1,
        description="Decodes of a micro-batch beyond which more are taken to raise its token rate "
        "no further.",
    )

    def max_batch_tokens(self, max_decodes: int) -> int:
        """Most tokens of a micro-batch that holds at most `max_decodes` decodes."""
        return max(self.prefill_tokens, max_decodes)


class BalancedConfig(StrictModel):
    """Our own policy: every micro-batch takes the same predicted time."""

    name: Literal["balanced"] = Field(
        default="balanced",
        description="The scheduling policy; `policy: <name>` alone takes its defaults.",
    )
    token_budget: int = Field(
        default=2048,
        ge=1,
        description="Most decodes and prefill tokens of a micro-batch together; fewer where more "
        "would hardly be cheaper for each, as the cost model predicts. Decodes alone may exceed "
        "it, up to max_decodes; prefill then falls to min_prefill_tokens.",
    )
    min_prefill_tokens: int = Field(
        default=32,
        ge=1,
        description="Prefill tokens that a micro-batch may hold whatever the target time.",
    )
    tbt_target_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds between two tokens of a request that prefill shall not exceed; null: "
        "no bound.",
    )

    overtaking: float = Field(
        default=64.0,
        ge=0,
        description="Tokens of later, shorter prompts that may pass a waiting prompt, for each of "
        "its own; 0: prompts are served in the order of arrival.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_prefill_tokens > self.token_budget:
            raise ValueError(
                f"min_prefill_tokens={self.min_prefill_tokens}: must be <= "
                f"token_budget={self.token_budget}"
            )
        return self

    def max_batch_tokens(self, max_decodes: int) -> int:
        """Most tokens of a micro-batch that holds at most `max_decodes` decodes."""
        return max(self.token_budget, max_decodes + self.min_prefill_tokens)


def _expand_name(value: object) -> object:
    """`chunked_prefill` is short for a mapping with that name, and the name has a default."""
    if isinstance(value, str):
        return {"name": value}
    return {"name": "balanced"} | value if isinstance(value, dict) else value


AnyPolicyConfig = (
    BalancedConfig
    | TokenThrottlingConfig
    | ChunkedPrefillConfig
    | PrefillFirstConfig
    | TemporalConfig
)
PolicyConfig = Annotated[
    AnyPolicyConfig, Field(discriminator="name"), BeforeValidator(_expand_name)
]

# By the name that selects each.
POLICY_CONFIGS: dict[str, type[AnyPolicyConfig]] = {
    "balanced": BalancedConfig,
    "token_throttling": TokenThrottlingConfig,
    "chunked_prefill": ChunkedPrefillConfig,
    "prefill_first": PrefillFirstConfig,
    "temporal": TemporalConfig,
}
