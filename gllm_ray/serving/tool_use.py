"""What a request asks of tools: what its outputs have to match, and how they are parsed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gllm_ray.errors import InvalidRequestError
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.output_format import OutputGrammar, json_grammar
from gllm_ray.serving.tool_parsers import (
    HermesParser,
    JsonCallsParser,
    NamedCallParser,
    ToolParser,
)
from gllm_ray.serving.tool_schema import Tool, ToolChoice

_PYTHON_TAG = "<|python_tag|>"
_IDENTITY_KEYS = ("$id", "$schema")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that outputs may call, or have to.

    Attributes:
        tools: At least one.
        choice: Whether to call them, and which one; not `none`.
        is_parallel: An output may call several.
    """

    tools: Sequence[Tool]
    choice: ToolChoice
    is_parallel: bool

    @property
    def is_forced(self) -> bool:
        """Every output is a call, or several."""
        return self.choice.type != "auto"

    @property
    def finishes_with_calls(self) -> bool:
        """An output that ends after calls tells so; as of OpenAI, not if the function is given."""
        return self.choice.function is None

    def check(self, tokenizer: Tokenizer) -> None:
        """Check that the model can use tools.

        Raises:
            InvalidRequestError: It cannot, or not as asked.
        """
        check_shows_tools(tokenizer)
        if not self.is_forced and tokenizer.tool_parser == "none":
            raise InvalidRequestError(
                "how the model spells tool calls is not known, so tool_choice must be none, "
                "required or a function; for auto, the service has to set model.tool_parser",
                param="tool_choice",
            )

    def grammar(self) -> OutputGrammar | None:
        """What outputs have to match; None: anything.

        Raises:
            InvalidRequestError: That cannot be told.
        """
        if not self.is_forced:
            return None
        try:
            return OutputGrammar(json_grammar(self._schema), "tool_choice")
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"tools: {error}", param="tools") from error

    def new_parser(self, tokenizer: Tokenizer) -> ToolParser:
        """A parser for one output."""
        if self.choice.function is not None:
            return NamedCallParser(self.choice.function.name)
        if self.is_forced:
            return JsonCallsParser("[],")
        if tokenizer.tool_parser == "hermes":
            return HermesParser()
        return JsonCallsParser(";", _PYTHON_TAG)

    @property
    def _schema(self) -> dict[str, Any]:
        """The arguments of the function, or an array of calls of any of the tools."""
        if self.choice.function is not None:
            (schema,) = (
                tool.arguments_schema
                for tool in self.tools
                if tool.function.name == self.choice.function.name
            )
            return schema
        return {
            "type": "array",
            "minItems": 1,
            **({} if self.is_parallel else {"maxItems": 1}),
            "items": {
                "anyOf": [_call_schema(tool, f"urn:tool:{i}") for i, tool in enumerate(self.tools)]
            },
        }


def _call_schema(tool: Tool, identity: str) -> dict[str, Any]:
    """That of a call, within another schema."""
    # By its identity, references within it mean what they do where it stands alone. It takes the
    # place of the schema's own, which several may share, and is unknown to old drafts.
    others = {
        key: value for key, value in tool.arguments_schema.items() if key not in _IDENTITY_KEYS
    }
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "parameters": {"$id": identity, **others},
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def check_shows_tools(tokenizer: Tokenizer) -> None:
    """Check that the model gets to see tools.

    Raises:
        InvalidRequestError: It does not.
    """
    if not tokenizer.reads_tools:
        raise InvalidRequestError(
            "the model's chat template shows no tools to the model; leave tools out", param="tools"
        )
