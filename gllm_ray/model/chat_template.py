"""What a chat template tells, before a conversation is rendered."""

from collections.abc import Callable, Mapping, Sequence

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

from gllm_ray.config import ToolParserName

# What rendering a chat template may raise because of the messages or the tools.
TEMPLATE_REFUSALS = (TemplateError, ValueError, TypeError, RecursionError)
# Conversations that most templates take.
_CONVERSATIONS = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
}


class _Generation(Extension):
    """The tag around what a model says, which transformers adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's own extensions have it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands within it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_of(template: str) -> set[str]:
    """The variables that a template, which compiles, looks at, and does not set on every way."""
    environment = Environment(extensions=[_Generation, loopcontrols])
    return find_undeclared_variables(environment.parse(template)) - environment.globals.keys()


def guess_tool_parser(template: str) -> ToolParserName:
    """The form of tool calls that a template asks the model for; none: not one of those known."""
    text = template.replace("\\", "")  # before quotation marks within a text of Jinja's
    # Others have XML between the same markers.
    if "<tool_call>" in text and '"arguments"' in text:
        return "hermes"
    if '{"name": ' in text and '"parameters": ' in text and "ipython" in text:
        return "llama3_json"
    return "none"


def find_named_roles(render: Callable[[Sequence[Mapping[str, str]]], str]) -> frozenset[str]:
    """The roles whose messages a template shows to the model with the name of who wrote them.

    Args:
        render: The text that the template makes of messages.
    """

    def shows_names(role: str) -> bool:
        messages = [{"role": each, "content": "x"} for each in _CONVERSATIONS[role]]
        index = _CONVERSATIONS[role].index(role)
        texts = set()
        for name in ("Ada", "Eve"):
            messages[index]["name"] = name
            try:
                texts.add(render(messages))
            except TEMPLATE_REFUSALS:
                return False
        return len(texts) > 1

    return frozenset(filter(shows_names, _CONVERSATIONS))
