"""Tools, which of them to call, and earlier calls, as requests spell them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, FailFast, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from gllm_ray.serving.output_format import MAX_GRAMMAR_CHARS, spell
from gllm_ray.serving.request_schema import RequestSchema

MAX_TOOLS = 128
_MAX_ID_CHARS = 1024
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=_MAX_ID_CHARS)]


def _check_parameters(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is not None and schema.get("type", "object") != "object":
        raise PydanticCustomError("not_an_object", 'must be a JSON schema of "type": "object"')
    return schema


class FunctionDefinition(RequestSchema):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, AfterValidator(_check_parameters)] = None
    strict: bool | None = None


class Tool(RequestSchema):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: FunctionDefinition

    def as_template_input(self) -> dict[str, Any]:
        """The tool as chat templates know it, with what the client said of it."""
        said = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.function.parameters,
        }
        function = {key: value for key, value in said.items() if value is not None}
        return {"type": "function", "function": function}

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """What the arguments of a call have to match."""
        if self.function.parameters is None:
            return _NO_PARAMETERS
        return {"type": "object", **self.function.parameters}


class FunctionChoice(RequestSchema):
    """A function that has to be called."""

    name: FunctionName


class ToolChoice(RequestSchema):
    """Whether to call tools, and which one."""

    type: Literal["none", "auto", "required", "function"]
    function: FunctionChoice | None = None

    @model_validator(mode="after")
    def _check_function(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise PydanticCustomError(
                "function", "must have a function if its type is function, and only then"
            )
        return self


def parse_tool_choice(value: object) -> object:
    """OpenAI spells all but a function as a word; a validator of pydantic."""
    return {"type": value} if isinstance(value, str) else value


def check_tool_choice(value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
    """Refuse to call what is not there; a validator of pydantic."""
    if value is None or value.type in ("none", "auto") or "tools" not in info.data:
        return value
    names = [tool.function.name for tool in info.data["tools"] or ()]
    if not names:
        raise PydanticCustomError("needs_tools", "is only allowed when there are tools")
    if value.function is not None and value.function.name not in names:
        raise PydanticCustomError("no_such_tool", "must name a function of tools")
    return value


def check_tools(tools: list[Tool] | None) -> list[Tool] | None:
    """Refuse names that are not unique, and tools that are too long; a validator of pydantic."""
    if not tools:
        return tools
    if len({tool.function.name for tool in tools}) < len(tools):
        raise PydanticCustomError("not_unique", "must have names that differ from each other")
    try:
        num_chars = len(spell([tool.as_template_input() for tool in tools]))
    except ValueError as error:
        raise PydanticCustomError("schema", "{error}", {"error": str(error)}) from error
    if num_chars > MAX_GRAMMAR_CHARS:
        raise PydanticCustomError(
            "too_many_chars", "must have at most {limit} characters", {"limit": MAX_GRAMMAR_CHARS}
        )
    return tools


Tools = Annotated[
    list[Tool] | None, FailFast(), Field(max_length=MAX_TOOLS), AfterValidator(check_tools)
]


def _check_arguments(text: str) -> str:
    try:
        is_object = isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise PydanticCustomError("arguments", "must be a JSON object, as text")
    return text


class FunctionCall(RequestSchema):
    """A function and its arguments, in JSON; some clients spell no arguments as no text."""

    name: Annotated[str, Field(max_length=_MAX_ID_CHARS)]
    arguments: Annotated[str, AfterValidator(_check_arguments)]
    parsed_arguments: object = Field(default=None, description="OpenAI's client adds them.")


class ToolCall(RequestSchema):
    """A call that an earlier answer made."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(default=None, description="Of a streamed answer: its place.")

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates know it; they expect a mapping for its arguments."""
        arguments = json.loads(self.function.arguments or "{}")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
