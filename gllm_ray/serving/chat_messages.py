"""The messages of a conversation, as requests spell them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from gllm_ray.serving.request_schema import RequestSchema, check_text, only
from gllm_ray.serving.tool_schema import CallId, ToolCall

_MAX_NAME_CHARS = 1024
_MAX_TEXTS = 4096


def check_num_texts(value: object) -> object:
    """Bound the time that it takes to look at each message, in which no stream goes on."""
    messages = value if isinstance(value, list) else []
    lists = (
        [message.get("content"), message.get("tool_calls"), message.get("output")]
        for message in messages
        if isinstance(message, dict)
    )
    num_texts = sum(
        sum(len(part) for part in parts if isinstance(part, list)) or 1 for parts in lists
    )
    if num_texts > _MAX_TEXTS:
        raise PydanticCustomError(
            "too_many_texts",
            "must have at most {limit} messages, parts of messages and tool calls, not {num_texts}",
            {"limit": _MAX_TEXTS, "num_texts": num_texts},
        )
    return value


def _parse_content(value: object, info: ValidationInfo) -> object:
    # Calls with a mistake are not in `data`, and are told of already.
    if value is None and info.data.get("tool_calls", "wrong"):
        return []
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be text or a list of text parts")
    return value


def _check_tool_calls(value: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
    if value and info.data.get("role") != "assistant":
        raise PydanticCustomError("tool_calls", "is only for messages of the assistant")
    return value


def _check_tool_call_id(value: str | None, info: ValidationInfo) -> str | None:
    """A message is of a tool if, and only if, it answers a call."""
    if (value is not None) != (info.data.get("role") == "tool"):
        raise PydanticCustomError(
            "tool_call_id", "is what a message of a tool must have, and no other"
        )
    return value


class TextPart(RequestSchema):
    """A part of a message."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(check_text)]


class ChatMessage(RequestSchema):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall] | None, FailFast(), AfterValidator(_check_tool_calls)] = (
        None
    )
    tool_call_id: Annotated[CallId | None, AfterValidator(_check_tool_call_id)] = Field(
        default=None, validate_default=True
    )
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_parse_content)] = Field(
        default=None, validate_default=True
    )
    name: str | None = Field(default=None, max_length=_MAX_NAME_CHARS)

    # Clients send the empty fields of an earlier answer back.
    annotations: Annotated[object, only([])] = None
    audio: Annotated[object, only()] = None
    function_call: Annotated[object, only()] = None
    reasoning: Annotated[object, only()] = None
    reasoning_content: Annotated[object, only()] = None
    refusal: Annotated[object, only()] = None
    parsed: object = Field(default=None, description="OpenAI's client adds it: the content.")

    @property
    def num_chars(self) -> int:
        """Of the texts that a client wrote, or the model."""
        arguments = (call.function.arguments for call in self.tool_calls or ())
        return sum(map(len, arguments)) + sum(len(part.text) for part in self.content)

    @property
    def template_role(self) -> str:
        """The role as chat templates know it; the developer is their system."""
        return "system" if self.role == "developer" else self.role

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        message: dict[str, Any] = {
            "role": self.template_role,
            "content": "".join(part.text for part in self.content),
        }
        # Templates ask whether a message has a key.
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = self.name
        return message
