"""A conversation, and what the model's chat template is to make of it."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from gllm_ray.errors import InvalidRequestError
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.chat_messages import ChatMessage, check_num_texts
from gllm_ray.serving.request_schema import RequestSchema, at_most, check_text, is_text
from gllm_ray.serving.tool_schema import Tools

_MAX_VARIABLES = 16
_MAX_VARIABLE_CHARS = 1024

Text = Annotated[str, Field(max_length=_MAX_VARIABLE_CHARS), AfterValidator(check_text)]


def _check_variable(value: object) -> object:
    match value:
        case str() if is_text(value) and len(value) <= _MAX_VARIABLE_CHARS:
            return value
        case float() if math.isfinite(value):
            return value
        case None | int():
            return value
    raise PydanticCustomError(
        "variable",
        "must be a number, true, false, null, or a text of at most {limit} characters",
        {"limit": _MAX_VARIABLE_CHARS},
    )


TemplateVariables = Annotated[
    dict[Text, Annotated[object, AfterValidator(_check_variable)]] | None, at_most(_MAX_VARIABLES)
]


def _check_variables(value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
    if value and "reasoning_effort" in value and info.data.get("reasoning_effort") is not None:
        raise PydanticCustomError("said_twice", "must not repeat reasoning_effort")
    return value


def _check_continuation(value: bool | None, info: ValidationInfo) -> bool | None:
    if not value:
        return value
    if info.data.get("add_generation_prompt"):
        raise PydanticCustomError(
            "two_ends", "is only allowed where add_generation_prompt is not true"
        )
    last = info.data["messages"][-1] if "messages" in info.data else None
    if last is not None and (last.role != "assistant" or last.tool_calls):
        raise PydanticCustomError(
            "nothing_to_continue", "needs a last message of the assistant, without tool calls"
        )
    return value


class Conversation(RequestSchema):
    """What a prompt is made of by the model's chat template.

    `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs` are not OpenAI's.
    """

    messages: Annotated[list[ChatMessage], FailFast(), BeforeValidator(check_num_texts)] = Field(
        min_length=1
    )
    tools: Tools = None
    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool | None, AfterValidator(_check_continuation)] = None
    reasoning_effort: Text | None = None
    chat_template_kwargs: Annotated[TemplateVariables, AfterValidator(_check_variables)] = None

    def check(self, tokenizer: Tokenizer) -> None:
        """Check that the model's chat template looks at all that it is given.

        Raises:
            InvalidRequestError: It does not.
        """
        is_called = any(message.tool_calls for message in self.messages)
        if is_called and not tokenizer.reads_tool_calls:
            raise InvalidRequestError(
                "the model's chat template shows no tool_calls to the model; leave such messages "
                "out, or put the calls into their content",
                param="messages",
            )
        self._check_names(tokenizer)
        known = tokenizer.template_variables
        if unread := [name for name in self._variables if name not in known]:
            is_ours = unread[0] in (self.chat_template_kwargs or ())
            raise InvalidRequestError(
                f"the model's chat template does not look at {unread[0]!r}; it looks at "
                + (", ".join(sorted(known)) or "nothing of the kind"),
                param="chat_template_kwargs" if is_ours else unread[0],
            )

    def _check_names(self, tokenizer: Tokenizer) -> None:
        """A tool is known by the call that it answers; of others the template has to tell."""
        for index, message in enumerate(self.messages):
            role = message.template_role
            if message.name and role != "tool" and role not in tokenizer.named_roles:
                raise InvalidRequestError(
                    f"the model's chat template shows no name of a {role} message to the model; "
                    "leave it out, or write it into the content",
                    param=f"messages[{index}].name",
                )

    def apply_template(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of the prompt.

        Raises:
            InvalidRequestError: There is no template, or it refuses what it is given.
        """
        return tokenizer.apply_chat_template(
            [message.as_template_input() for message in self.messages],
            [tool.as_template_input() for tool in self.tools or ()] or None,
            add_generation_prompt=(
                not self.continue_final_message
                if self.add_generation_prompt is None
                else self.add_generation_prompt
            ),
            continue_final_message=bool(self.continue_final_message),
            **self._variables,
        )

    @property
    def _variables(self) -> dict[str, Any]:
        """What the template is told beside the conversation and its tools."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        return variables
