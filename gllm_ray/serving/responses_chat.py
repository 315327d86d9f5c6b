"""A request of the Responses API as the chat's route takes it, which serves both."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gllm_ray.errors import InvalidRequestError
from gllm_ray.serving.chat_messages import ChatMessage
from gllm_ray.serving.openai_protocol import ChatCompletionRequest, GenerationParams
from gllm_ray.serving.request_schema import parse_schema
from gllm_ray.serving.responses_input import MessageItem, as_messages, parse_items
from gllm_ray.serving.responses_request import ResponsesRequest

_SHARED = GenerationParams.model_fields.keys() - ResponsesRequest.__annotations__.keys()
# What errors of the chat's route call by another name.
_NAMES = {
    "these messages": "this input",
    "such messages": "such items",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
_CHAT_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")


def as_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request as the chat's route takes it.

    Raises:
        InvalidRequestError: It asks for what does not go together.
        RequestValidationError: So it does, or an item of the input is none.
    """
    chat: ChatCompletionRequest = parse_schema(
        ChatCompletionRequest,
        {
            **{name: getattr(body, name) for name in _SHARED},
            **_conversation(body),
            **_tools(body),
            "logprobs": body.num_logprobs is not None,
            "max_completion_tokens": body.max_output_tokens,
            "response_format": _response_format(body),
            "top_logprobs": body.top_logprobs,
        },
    )
    if chat.tool_use is not None and chat.logprobs:
        raise InvalidRequestError(
            "include: message.output_text.logprobs tells of text, and cannot be told where tools "
            "may be called; leave it out, or use /v1/chat/completions",
            param="include",
        )
    return chat


def _conversation(body: ResponsesRequest) -> dict[str, Any]:
    """The fields of `Conversation` but for the tools; as in vLLM, a cut answer is gone on with."""
    items = parse_items(body.input)
    messages = as_messages(items)
    is_cut = isinstance(items[-1], MessageItem) and items[-1].is_cut
    told = []
    if body.instructions:
        told = [ChatMessage(role="system", content=body.instructions)]
    return {
        "messages": told + messages,
        "continue_final_message": is_cut and not messages[-1].tool_calls,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "chat_template_kwargs": body.chat_template_kwargs,
    }


def _tools(body: ResponsesRequest) -> dict[str, Any]:
    choice = None
    if body.tool_choice is not None:
        name = body.tool_choice.name
        choice = {"type": body.tool_choice.type, "function": name and {"name": name}}
    tools = [{"type": tool.type, "function": tool.definition} for tool in body.tools or ()]
    return {
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
    }


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    if body.text is None or body.text.format is None:
        return None
    schema = body.text.format.said
    wanted: dict[str, Any] = {"type": schema.pop("type")}
    return wanted | ({"json_schema": schema} if schema else {})


@contextmanager
def in_names_of_responses() -> Iterator[None]:
    """Tell of what is wrong by the names of the Responses API.

    Raises:
        InvalidRequestError: With those names for the chat's.
    """
    try:
        yield
    except InvalidRequestError as error:
        param = error.param and _CHAT_NAME.sub(_own_name, error.param)
        message = _CHAT_NAME.sub(_own_name, error.message)
        raise InvalidRequestError(message, param=param, code=error.code) from error


def _own_name(match: re.Match[str]) -> str:
    return _NAMES[match.group()]
