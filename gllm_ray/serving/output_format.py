"""What an output has to look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

import json
import re
from itertools import chain, groupby, islice
from typing import Annotated, Any, Literal, NamedTuple, Self

from llguidance import LLMatcher, grammar_from
from llguidance.gbnf_to_lark import gbnf_to_lark
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gllm_ray.errors import InvalidRequestError
from gllm_ray.serving.request_schema import RequestSchema, only

_MAX_NAME_CHARS = 1024
MAX_GRAMMAR_CHARS = 2**18
# As many as have room, of a few characters each.
_MAX_CHOICES = 2**15
# Of one text: its mask takes time in proportion, and twice as many llguidance does not follow.
_MAX_CHOICE_CHARS = 2**16
# llguidance follows side by side what begins alike, and gives up if that is long.
_MIN_SHARED_CHARS = 64
# Translating takes longer than in proportion to the length: a quarter of a second at this one.
_MAX_GBNF_CHARS = 2**15
# How a line begins that a grammar in Lark's syntax has to have, and no other has.
_LARK_LINE = re.compile(r"[ \t]*(%llguidance\b|start[ \t]*:(?!:=))")
# Of a schema; llguidance reads some more levels.
_MAX_DEPTH = 100
# As JSON is mostly written: one space, or a new line and its indentation. Without a bound, a model
# that likes white space goes on with it until its limit of tokens.
_WHITE_SPACE = r" |\r?\n[ \t]{0,32}"
_ANY_OBJECT = {"type": "object"}


class JsonSchema(RequestSchema):
    """A named JSON schema. Outputs match it whether or not it is `strict`."""

    name: str = Field(max_length=_MAX_NAME_CHARS)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestSchema):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "must have a json_schema if its type is json_schema, and only then"
            )
        return self

    @property
    def grammar(self) -> str:
        """What llguidance makes of it; empty: any text will do."""
        if self.type == "text":
            return ""
        return json_grammar(self.json_schema.schema_ if self.json_schema else _ANY_OBJECT)


def _check_schema_type(value: object) -> object:
    if not isinstance(value, dict | str | None):
        raise PydanticCustomError("schema_type", "must be a JSON schema: an object, or its text")
    return value


class StructuredOutputs(RequestSchema):
    """vLLM's way to ask for JSON and more; exactly one of its fields."""

    json_: Annotated[Any, AfterValidator(_check_schema_type)] = Field(default=None, alias="json")
    regex: str | None = None
    choice: (
        Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES, fail_fast=True)] | None
    ) = None
    grammar: str | None = Field(default=None, description="In Lark's syntax, or GBNF.")
    json_object: bool | None = None

    disable_additional_properties: Annotated[object, only(False)] = None
    disable_any_whitespace: Annotated[object, only(False)] = None
    structural_tag: Annotated[object, only()] = None
    whitespace_pattern: Annotated[object, only()] = None

    @model_validator(mode="after")
    def _check_is_one(self) -> Self:
        fields = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(field is not None for field in fields) != 1:
            raise PydanticCustomError(
                "not_one", "must have exactly one of json, regex, choice, grammar and json_object"
            )
        return self

    @property
    def llguidance_grammar(self) -> str:
        """What llguidance makes of it.

        Raises:
            ValueError: It is neither JSON, where it should be, nor a grammar, or too long a one.
        """
        if self.json_ is not None:
            return json_grammar(self.json_)
        if self.json_object:
            return json_grammar(_ANY_OBJECT)
        if self.regex is not None:
            _check_length(len(self.regex))
            return grammar_from("regex", self.regex)
        if self.choice is not None:
            _check_length(sum(map(len, self.choice)))
            return grammar_from("lark", _choice_rules(self.choice))
        return _lark_or_gbnf(self.grammar or "")


class OutputGrammar(NamedTuple):
    """A grammar that nobody has compiled yet, and the parameter it is from."""

    grammar: str
    param: str


def output_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> OutputGrammar | None:
    """The grammar of a body, if an output has to match one.

    Raises:
        InvalidRequestError: There are two, or it is none, or too long.
    """
    has_format = response_format is not None and response_format.type != "text"
    if has_format and structured_outputs is not None:
        raise InvalidRequestError(
            "response_format and structured_outputs both constrain the output; give one of them",
            param="structured_outputs",
        )
    param = "response_format" if has_format else "structured_outputs"
    try:
        if structured_outputs is not None:
            grammar = structured_outputs.llguidance_grammar
        elif response_format is not None:
            grammar = response_format.grammar
        else:
            return None
        _check_length(len(grammar))
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error
    return OutputGrammar(grammar, param) if grammar else None


def _check_length(num_chars: int) -> None:
    """Raise before work that takes as long as the text is, during which no other thread runs."""
    if num_chars > MAX_GRAMMAR_CHARS:
        raise ValueError(f"it is too long: the limit is {MAX_GRAMMAR_CHARS} characters")


def _choice_rules(choice: list[str]) -> str:
    """Rules in Lark's syntax for one of several texts; a long beginning that some share is one."""
    if (length := max(map(len, choice))) > _MAX_CHOICE_CHARS:
        raise ValueError(
            f"a text of the choice has {length} characters; the limit is {_MAX_CHOICE_CHARS}"
        )
    rules: list[str] = []
    todo = [sorted(set(choice))]
    for texts in todo:
        alternatives = []
        for _, group in groupby(texts, key=lambda text: text[:_MIN_SHARED_CHARS]):
            first, *others = group
            if not others:
                alternatives.append(json.dumps(first, ensure_ascii=False))
                continue
            pairs = enumerate(zip(first, others[-1], strict=False))  # they are sorted
            shared = first[: next((place for place, (a, b) in pairs if a != b), None)]
            alternatives.append(f"{json.dumps(shared, ensure_ascii=False)} rest{len(todo)}")
            todo.append([text[len(shared) :] for text in (first, *others)])
        name = f"rest{len(rules)}" if rules else "start"
        rules.append(f"{name}: {' | '.join(alternatives)}")
    return "\n".join(rules)


def _lark_or_gbnf(text: str) -> str:
    _check_length(len(text))
    # llguidance, which can tell them apart, too, takes a second for 16,000 empty lines, four for
    # twice as many, and lets no other thread run.
    if any(map(_LARK_LINE.match, text.splitlines())):
        return grammar_from("lark", text)
    if len(text) > _MAX_GBNF_CHARS:
        raise ValueError(
            f"the grammar has {len(text)} characters; the limit is {_MAX_GBNF_CHARS} in GBNF, "
            "which a grammar without a rule `start:` is taken for"
        )
    try:
        lark = gbnf_to_lark(text)
    except Exception as error:  # it raises no other class
        raise ValueError(f"the grammar is neither GBNF nor in Lark's syntax: {error}") from error
    return grammar_from("lark", lark)


def json_grammar(schema: dict[str, Any] | str) -> str:
    """What llguidance makes of a JSON schema.

    Raises:
        ValueError: It is none, or too long.
    """
    text = schema if isinstance(schema, str) else spell(schema)
    _check_length(len(text))
    options = {"whitespace_pattern": _WHITE_SPACE}
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=options)
    except ValueError as error:
        raise ValueError(f"json must be a JSON schema, the text of an object: {error}") from error


def spell(schema: object) -> str:
    """JSON of a schema, or as much of it as shows that it is too long.

    Raises:
        ValueError: It is nested too deeply, or has too many values.
    """
    _check_depth(schema)
    chunks, num_chars = [], 0
    for chunk in json.JSONEncoder(ensure_ascii=False).iterencode(schema):
        chunks.append(chunk)
        num_chars += len(chunk)
        if num_chars > MAX_GRAMMAR_CHARS:
            break
    return "".join(chunks)


def _check_depth(schema: object) -> None:
    """Raise before work that takes as long as the schema is long, times its depth."""
    level, num_values = [schema], 0
    for _ in range(_MAX_DEPTH):
        children = chain.from_iterable(
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        )
        level = list(islice(children, MAX_GRAMMAR_CHARS + 1))
        if not level:
            return
        num_values += len(level)
        _check_length(num_values)  # each has a character at least
    raise ValueError(f"the schema is nested too deeply: the limit is {_MAX_DEPTH} levels")
