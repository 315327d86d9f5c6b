"""The input of the Responses API: items, and the messages of a conversation that they make."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError

from gllm_ray.serving.chat_messages import ChatMessage
from gllm_ray.serving.request_schema import RequestSchema, check_text, only, parse_schema
from gllm_ray.serving.tool_schema import CallId, FunctionCall, ToolCall

_MAX_NAME_CHARS = 1024

_Name = Annotated[str, Field(max_length=_MAX_NAME_CHARS)]
_Status = Literal["in_progress", "completed", "incomplete"]


def _parse_texts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be text or a list of text parts")
    return value


class InputText(RequestSchema):
    """A part of a message, or of what a tool answered."""

    type: Literal["input_text", "output_text"]
    text: Annotated[str, AfterValidator(check_text)]

    # Clients send an earlier answer back, with all that it told about its text.
    annotations: Annotated[object, only([])] = None
    logprobs: object = None
    parsed: object = Field(default=None, description="OpenAI's client adds it: the text.")
    prompt_cache_breakpoint: Annotated[object, only()] = None


_Texts = Annotated[list[InputText], FailFast(), BeforeValidator(_parse_texts)]


class MessageItem(RequestSchema):
    """What a client wrote, or the model."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Texts
    id: _Name | None = None
    status: _Status | None = None
    phase: Annotated[object, only()] = None

    @property
    def is_cut(self) -> bool:
        """The model had not said all of it."""
        return self.role == "assistant" and self.status in ("in_progress", "incomplete")

    def as_message(self) -> dict[str, Any]:
        """The fields of a chat message."""
        return {"role": self.role, "content": list(self.content)}


class FunctionCallItem(FunctionCall):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: CallId
    id: _Name | None = None
    status: _Status | None = None
    async_: Annotated[object, only(False)] = Field(
        default=None,
        validation_alias=AliasChoices("async", "async_"),
        description="OpenAI's client has two names for it.",
    )
    caller: Annotated[object, only()] = None
    namespace: Annotated[object, only()] = None

    def as_message(self) -> dict[str, Any]:
        """The fields of a chat message."""
        call = ToolCall(id=self.call_id, function=self)
        return {"role": "assistant", "content": [], "tool_calls": [call]}


class FunctionCallOutputItem(RequestSchema):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: _Texts
    name: _Name | None = None
    id: _Name | None = None
    status: _Status | None = None
    caller: Annotated[object, only()] = None
    namespace: Annotated[object, only()] = None

    def as_message(self) -> dict[str, Any]:
        """The fields of a chat message."""
        fields = {"role": "tool", "tool_call_id": self.call_id, "name": self.name}
        return {**fields, "content": list(self.output)}


InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem
_ITEMS: dict[str, type[InputItem]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
}


class _Kind(RequestSchema):
    """What tells the kinds of items apart."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message", "function_call", "function_call_output"] = "message"


def parse_items(items: Sequence[dict[str, Any]]) -> list[InputItem]:
    """The items of an input.

    Raises:
        RequestValidationError: One of them is none.
    """
    return [
        parse_schema(_ITEMS[parse_schema(_Kind, item, "input", index).type], item, "input", index)
        for index, item in enumerate(items)
    ]


def as_messages(items: Sequence[InputItem]) -> list[ChatMessage]:
    """The messages of a chat; the calls of an answer are of one message with the text around."""
    drafts: list[dict[str, Any]] = []
    for item in items:
        fields = item.as_message()
        if drafts and _is_one_answer(drafts[-1], fields):
            for key in ("content", "tool_calls"):
                drafts[-1].setdefault(key, []).extend(fields.get(key, ()))
        else:
            drafts.append(fields)
    return [ChatMessage.model_construct(**draft) for draft in drafts]


def _is_one_answer(message: dict[str, Any], following: dict[str, Any]) -> bool:
    is_assistants = message["role"] == following["role"] == "assistant"
    return is_assistants and ("tool_calls" in message or "tool_calls" in following)
