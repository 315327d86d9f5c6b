"""What the text of a chat template tells, before anything is rendered."""

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

from gllm_ray.config import ToolParserName


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
