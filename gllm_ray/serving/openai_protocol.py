"""The requests of OpenAI's API: a parameter is honoured or refused by name, never ignored.

A parameter that cannot be honoured yet is accepted with the values that ask for nothing, because
clients send their defaults.
"""

from abc import abstractmethod
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from gllm_ray.errors import InvalidRequestError
from gllm_ray.model.generation_config import MAX_TEMPERATURE
from gllm_ray.serving.conversation import Conversation
from gllm_ray.serving.output_format import ResponseFormat, StructuredOutputs
from gllm_ray.serving.request_schema import RequestSchema, at_most, is_text, only, refuse_unless
from gllm_ray.serving.tool_schema import ToolChoice, check_tool_choice, parse_tool_choice
from gllm_ray.serving.tool_use import ToolUse

_MAX_STOP_STRINGS = 16
_MAX_STOP_CHARS = 1024
_MAX_STOP_TOKENS = 128
_MAX_BIASES = 1024
_MAX_ALLOWED_TOKENS = 1024
_MAX_BAD_WORDS = 128
_MAX_NAME_CHARS = 1024
_MAX_OUTPUTS = 128
_MAX_LOGPROBS = 20


def _check_best_of(value: object, info: ValidationInfo) -> object:
    """The best `n` of `n` outputs are all of them."""
    return refuse_unless(value, (info.data.get("n") or 1,), instead="n")


def _check_top_logprobs(value: int | None, info: ValidationInfo) -> int | None:
    if value and not info.data.get("logprobs"):
        raise PydanticCustomError("needs_logprobs", "is only allowed when logprobs is true")
    return value


def _parse_stop(value: object) -> object:
    if value is not None and not isinstance(value, str | list):
        raise PydanticCustomError("stop_type", "must be text or a list of texts")
    return [value] if isinstance(value, str) else value


def _parse_prompts(value: object) -> object:
    """One prompt or several, each text or token ids, as a list of prompts."""
    is_several = isinstance(value, list) and bool(value) and type(value[0]) is not int
    prompts = value if is_several else [value]
    if len(prompts) > _MAX_OUTPUTS:
        raise PydanticCustomError(
            "too_many_prompts",
            "must have at most {limit} prompts, not {num_prompts}",
            {"limit": _MAX_OUTPUTS, "num_prompts": len(prompts)},
        )
    if not all(is_text(item) or _is_token_ids(item) for item in prompts):
        raise PydanticCustomError(
            "prompt_type", "must be text, a list of token ids, or a list of such prompts"
        )
    return prompts


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_continuous_usage(value: bool | None, info: ValidationInfo) -> bool | None:
    if value and not info.data.get("include_usage"):
        raise PydanticCustomError("needs_usage", "is only allowed when include_usage is true")
    return value


class StreamOptions(RequestSchema):
    """What a stream tells beside its text; `continuous_usage_stats` is not OpenAI's."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[bool | None, AfterValidator(_check_continuous_usage)] = None
    include_obfuscation: Annotated[object, only(False)] = None


class GenerationParams(RequestSchema):
    """What both endpoints take.

    `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `include_stop_str_in_output`,
    `min_tokens`, `ignore_eos`, `prompt_logprobs`, `allowed_token_ids`, `bad_words`,
    `skip_special_tokens`, `return_token_ids`, `cache_salt`, `priority`, `expected_output_tokens`,
    `queue_timeout_s`, `structured_outputs` and the `response_format` of a completion are not
    OpenAI's.
    """

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1: no limit.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=_MAX_OUTPUTS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]] | None,
        Field(max_length=_MAX_STOP_STRINGS),
        BeforeValidator(_parse_stop),
    ] = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=_MAX_STOP_TOKENS)
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, at_most(_MAX_BIASES)
    ] = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    allowed_token_ids: list[int] | None = Field(
        default=None, min_length=1, max_length=_MAX_ALLOWED_TOKENS
    )
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]] | None,
        Field(max_length=_MAX_BAD_WORDS),
    ] = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=_MAX_NAME_CHARS)
    user: str | None = Field(default=None, max_length=_MAX_NAME_CHARS)
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    expected_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    queue_timeout_s: float | None = Field(default=None, gt=0)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    metadata: Annotated[object, only({})] = None
    service_tier: Annotated[object, only("auto", "default")] = None
    store: Annotated[object, only(False)] = None

    # vLLM's, whose clients send their defaults, too.
    guided_choice: Annotated[object, only(instead="structured_outputs.choice")] = None
    guided_grammar: Annotated[object, only(instead="structured_outputs.grammar")] = None
    guided_json: Annotated[object, only(instead="structured_outputs.json")] = None
    guided_regex: Annotated[object, only(instead="structured_outputs.regex")] = None
    kv_transfer_params: Annotated[object, only()] = None
    length_penalty: Annotated[object, only(1)] = None
    logits_processors: Annotated[object, only([])] = None
    logprob_token_ids: Annotated[object, only()] = None
    repetition_detection: Annotated[object, only()] = None
    request_id: Annotated[object, only()] = None
    return_tokens_as_token_ids: Annotated[object, only(False)] = None
    spaces_between_special_tokens: Annotated[object, only(True)] = None
    thinking_token_budget: Annotated[object, only(-1)] = None
    truncate_prompt_tokens: Annotated[object, only()] = None
    truncation_side: Annotated[object, only()] = None
    use_beam_search: Annotated[object, only(False)] = None
    vllm_xargs: Annotated[object, only({})] = None

    @property
    def outputs_per_prompt(self) -> int:
        """How often each prompt is continued."""
        return self.n or 1

    @property
    def tool_use(self) -> ToolUse | None:
        """Of the tools that outputs may call; None: none."""
        return None

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.num_logprobs`."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `GenerationRequest.num_prompt_logprobs`."""
        return self.prompt_logprobs


class CompletionRequest(GenerationParams):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_parse_prompts)]
    max_tokens: int | None = Field(default=None, ge=0)

    add_special_tokens: Annotated[object, only(True)] = None
    best_of: Annotated[object, AfterValidator(_check_best_of)] = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    prompt_embeds: Annotated[object, only()] = None
    suffix: Annotated[object, only("")] = None

    @property
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.num_logprobs`."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `GenerationRequest.num_prompt_logprobs`."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((num for num in asked if num is not None), default=None)

    def check_num_outputs(self) -> None:
        """Bound the work that one body can ask for.

        Raises:
            InvalidRequestError: It asks for too many outputs.
        """
        num_prompts, n = len(self.prompt), self.outputs_per_prompt
        if num_prompts * n > _MAX_OUTPUTS:
            raise InvalidRequestError(
                f"n={n} for each of {num_prompts} prompts comes to {num_prompts * n} outputs; the "
                f"limit is {_MAX_OUTPUTS}, so send fewer prompts or a smaller n",
                param="n",
            )


class ChatCompletionRequest(GenerationParams, Conversation):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1)

    add_special_tokens: Annotated[object, only(False)] = None
    audio: Annotated[object, only()] = None
    chat_template: Annotated[object, only()] = None
    documents: Annotated[object, only([])] = None
    echo: Annotated[object, only(False)] = None
    function_call: Annotated[object, only("none", "auto", instead="tool_choice")] = None
    functions: Annotated[object, only([], instead="tools")] = None
    include_reasoning: Annotated[object, only(True)] = None
    logprobs: bool | None = None
    media_io_kwargs: Annotated[object, only({})] = None
    mm_processor_kwargs: Annotated[object, only({})] = None
    modalities: Annotated[object, only(["text"])] = None
    moderation: Annotated[object, only()] = None
    parallel_tool_calls: bool | None = None
    prediction: Annotated[object, only()] = None
    prompt_cache_key: Annotated[object, only("")] = None
    prompt_cache_options: Annotated[object, only()] = None
    prompt_cache_retention: Annotated[object, only()] = None
    safety_identifier: Annotated[object, only("")] = None
    tool_choice: Annotated[
        ToolChoice | None, BeforeValidator(parse_tool_choice), AfterValidator(check_tool_choice)
    ] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=_MAX_LOGPROBS), AfterValidator(_check_top_logprobs)
    ] = None
    verbosity: Annotated[object, only("medium")] = None
    web_search_options: Annotated[object, only()] = None

    @property
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tool_use(self) -> ToolUse | None:
        """See `GenerationParams.tool_use`."""
        choice = self.tool_choice or ToolChoice(type="auto")
        if not self.tools or choice.type == "none":
            return None
        return ToolUse(self.tools, choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def answer_limit(self) -> int | None:
        """Tokens the answer may have, if either spelling limits them.

        Raises:
            InvalidRequestError: The two disagree.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                f"max_tokens={self.max_tokens} and max_completion_tokens="
                f"{self.max_completion_tokens} differ; give one of them",
                param="max_tokens",
            )
        return next(iter(limits), None)
