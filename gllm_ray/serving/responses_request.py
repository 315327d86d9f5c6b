"""The request of OpenAI's Responses API.

Nothing is stored, so whatever refers to an earlier response or to a later one is refused.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gllm_ray.serving.chat_messages import check_num_texts
from gllm_ray.serving.conversation import TemplateVariables, Text
from gllm_ray.serving.openai_protocol import GenerationParams
from gllm_ray.serving.request_schema import RequestSchema, at_most, check_text, only
from gllm_ray.serving.tool_schema import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionName,
    parse_tool_choice,
)

_MAX_METADATA = 16
_MAX_NAME_CHARS = 1024


class _Kind(RequestSchema):
    """What is told first of a tool that is no function."""

    type: Literal["function"]


class FunctionTool(FunctionDefinition, _Kind):
    """A function that the model may call."""

    allowed_callers: Annotated[object, only(["direct"])] = None
    async_: Annotated[object, only(False)] = Field(default=None, alias="async")
    defer_loading: Annotated[object, only(False)] = None
    output_schema: Annotated[object, only()] = None

    @property
    def definition(self) -> dict[str, Any]:
        """What the client said of the function."""
        return {name: getattr(self, name) for name in FunctionDefinition.model_fields}


class ResponseToolChoice(RequestSchema):
    """Whether to call tools, and which one."""

    type: Literal["none", "auto", "required", "function"]
    name: FunctionName | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.type == "function") != (self.name is not None):
            raise PydanticCustomError(
                "name", "must have a name if its type is function, and only then"
            )
        return self

    @property
    def said(self) -> str | dict[str, Any]:
        """As clients spell it."""
        return {"type": self.type, "name": self.name} if self.name else self.type


class TextFormat(RequestSchema):
    """What an output has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, max_length=_MAX_NAME_CHARS)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise PydanticCustomError("no_schema", "must have a name and a schema")
        if self.type != "json_schema" and len(self.said) > 1:
            raise PydanticCustomError("schema", "must have nothing but its type")
        return self

    @property
    def said(self) -> dict[str, Any]:
        """As clients spell it."""
        fields = {
            "type": self.type,
            "name": self.name,
            "schema": self.schema_,
            "description": self.description,
            "strict": self.strict,
        }
        return {name: value for name, value in fields.items() if value is not None}


class TextConfig(RequestSchema):
    """Of the text of an output."""

    format: TextFormat | None = None
    verbosity: Annotated[object, only("medium")] = None


class Reasoning(RequestSchema):
    """How much the model thinks."""

    effort: Text | None = None
    context: Annotated[object, only("auto")] = None
    generate_summary: Annotated[object, only()] = None
    mode: Annotated[object, only("standard")] = None
    summary: Annotated[object, only()] = None


class ResponseStreamOptions(RequestSchema):
    """What a stream tells beside its text."""

    include_obfuscation: Annotated[object, only(False)] = None


def _parse_input(value: object) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "must be text or a list of items")
    return check_num_texts(value)


def _check_top_logprobs(value: int | None, info: ValidationInfo) -> int | None:
    if value and not info.data.get("include"):
        raise PydanticCustomError(
            "needs_logprobs", "is only allowed when include has message.output_text.logprobs"
        )
    return value


class ResponsesRequest(GenerationParams):
    """The body of POST /v1/responses; from `GenerationParams` it takes what is not OpenAI's."""

    input: Annotated[list[dict[str, Any]], BeforeValidator(_parse_input)] = Field(min_length=1)
    instructions: Annotated[str, AfterValidator(check_text)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        at_most(_MAX_METADATA),
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool] | None, FailFast(), Field(max_length=MAX_TOOLS)] = None
    tool_choice: Annotated[ResponseToolChoice | None, BeforeValidator(parse_tool_choice)] = None
    top_logprobs: Annotated[int | None, AfterValidator(_check_top_logprobs)] = None
    chat_template_kwargs: TemplateVariables = None

    access_programs: Annotated[object, only()] = None
    background: Annotated[object, only(False)] = None
    context_management: Annotated[object, only([])] = None
    conversation: Annotated[object, only(instead="the whole conversation as input")] = None
    image: Annotated[object, only()] = None
    max_tool_calls: Annotated[object, only()] = None
    moderation: Annotated[object, only()] = None
    previous_response_id: Annotated[object, only(instead="the whole conversation as input")] = None
    prompt: Annotated[object, only(instead="instructions and input")] = None
    prompt_cache_key: Annotated[object, only("")] = None
    prompt_cache_options: Annotated[object, only()] = None
    prompt_cache_retention: Annotated[object, only()] = None
    safety_identifier: Annotated[object, only("")] = None
    truncation: Annotated[object, only("disabled")] = None

    # Of vLLM's own.
    enable_response_messages: Annotated[object, only(False)] = None
    mm_processor_kwargs: Annotated[object, only({})] = None
    previous_input_messages: Annotated[object, only()] = None
    previous_response: Annotated[object, only()] = None

    # The other routes have them by these names, or a place for what they ask to be told.
    echo: Annotated[object, only(False)] = None
    max_tokens: Annotated[object, only(instead="max_output_tokens")] = None
    n: Annotated[object, only(1)] = None
    prompt_logprobs: Annotated[object, only()] = None
    response_format: Annotated[object, only(instead="text.format")] = None
    return_token_ids: Annotated[object, only(False)] = None

    @property
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.num_logprobs`."""
        return (self.top_logprobs or 0) if self.include else None
