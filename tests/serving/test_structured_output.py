"""Outputs that have to match something, by OpenAI's own client over the demo model."""

import asyncio
import json
import re
import time
from dataclasses import replace
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from gllm_ray.errors import InvalidRequestError
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.policy_config import TemporalConfig
from gllm_ray.serving.openai_api import MAX_BODY_BYTES
from gllm_ray.serving.output_format import StructuredOutputs, output_grammar
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.demo_api import DEMO_MODEL, ask_demo, start_demo_pipeline
from tests.serving.local_api import BODIES, CHAT, openai_client

MODEL = LocalService.model_name


class Animal(BaseModel):
    """What a client of OpenAI's may ask for."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)
    kind: Literal["cat", "dog"]


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


SCHEMA = Animal.model_json_schema()


def follows_schema(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMATS = {
    "json_schema": ({"response_format": json_schema(SCHEMA)}, follows_schema),
    "json": ({"structured_outputs": {"json": SCHEMA}}, follows_schema),
    "json text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, follows_schema),
    "regex": (
        {"structured_outputs": {"regex": "[a-z]{3}-[0-9]{2}"}},
        lambda text: re.fullmatch("[a-z]{3}-[0-9]{2}", text),
    ),
    "choice": (
        {"structured_outputs": {"choice": ["yes", "naïve\n", '"€" /x/']}},
        lambda text: text in ("yes", "naïve\n", '"€" /x/'),
    ),
    "lark": (
        {"structured_outputs": {"grammar": "\n" * 10**5 + 'start: "a" b "z"\nb: /[0-9]{2}/'}},
        lambda text: re.fullmatch("a[0-9][0-9]z", text),
    ),
    "gbnf": (
        {"structured_outputs": {"grammar": 'root ::= "a" b\nb ::= [0-9] [0-9]'}},
        lambda text: re.fullmatch("a[0-9][0-9]", text),
    ),
}


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


async def texts_of(client, *, is_chat, is_streamed, **options):
    """The text and the finish reason of each choice."""
    kind = client.chat.completions if is_chat else client.completions
    prompt = {"messages": CHAT} if is_chat else {"prompt": "Who is it?"}
    answer = await kind.create(model=MODEL, max_tokens=90, stream=is_streamed, **prompt, **options)
    if not is_streamed:
        return [
            (choice.message.content if is_chat else choice.text, choice.finish_reason)
            for choice in answer.choices
        ]
    texts, reasons = {}, {}
    async for chunk in answer:
        (choice,) = chunk.choices
        text = choice.delta.content if is_chat else choice.text
        texts[choice.index] = texts.get(choice.index, "") + (text or "")
        reasons[choice.index] = choice.finish_reason
    return [(texts[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_chat", [True, False])
def test_every_output_matches_what_was_asked_for_and_ends(tokenizer, pipeline, name, is_chat):
    wanted, matches = FORMATS[name]

    async def scenario(_, client):
        kinds = {"is_chat": is_chat, "extra_body": wanted}
        return await asyncio.gather(
            *(
                texts_of(client, is_streamed=is_streamed, **options, **kinds)
                for options in ({"temperature": 0}, {"temperature": 2, "seed": 3, "n": 4})
                for is_streamed in (False, True)
            )
        )

    for ring in (False, True):
        greedy, streamed, drawn, drawn_streamed = ask_demo(tokenizer, pipeline, scenario, ring=ring)
        assert (greedy, drawn) == (streamed, drawn_streamed)
        assert len(drawn) == 4
        for text, reason in greedy + drawn:
            assert matches(text), text
            assert reason == "stop"


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"json_object": True}}},
    ],
)
def test_any_json_object_is_one(tokenizer, pipeline, options):
    async def scenario(_, client):
        return await texts_of(
            client,
            is_chat=True,
            is_streamed=False,
            n=8,
            seed=1,
            **options,
        )

    ended = [text for text, reason in ask_demo(tokenizer, pipeline, scenario) if reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_what_vllm_leaves_to_its_defaults_is_accepted():
    schema = {"type": "object"}
    neutral = dict.fromkeys(("regex", "choice", "structural_tag", "whitespace_pattern"))
    neutral |= {"json_object": False, "disable_any_whitespace": False}
    neutral |= {"disable_additional_properties": False}
    said = StructuredOutputs.model_validate({"json": schema} | neutral)
    assert output_grammar(None, said) == output_grammar(None, StructuredOutputs(json=schema))


def test_openais_client_parses_an_answer_into_a_model(tokenizer, pipeline):
    async def scenario(_, client):
        answer = await client.beta.chat.completions.parse(
            model=MODEL, messages=CHAT, response_format=Animal, temperature=0, max_tokens=90
        )
        return answer.choices[0].message

    message = ask_demo(tokenizer, pipeline, scenario)
    assert isinstance(message.parsed, Animal)
    assert Animal.model_validate_json(message.content) == message.parsed


async def ask_for_twelve(service, client):
    wanted, _ = FORMATS["json_schema"]
    answers = await texts_of(
        client, is_chat=True, is_streamed=False, n=12, seed=5, extra_body=wanted
    )
    return answers, service.scheduler.load().num_preemptions


@pytest.fixture(scope="module")
def twelve(tokenizer, pipeline):
    answers, _ = ask_demo(tokenizer, pipeline, ask_for_twelve)
    return answers


@pytest.mark.parametrize(
    "scheduler",
    [
        {"num_blocks": 64, "ring": False},
        {"num_blocks": 64, "ring": True},
        {"num_blocks": 64, "policy": TemporalConfig(prefill_tokens=64)},
        {"max_decodes": 1},
    ],
    ids=["preempted", "preempted in the ring", "temporal", "in turns"],
)
def test_outputs_do_not_depend_on_how_they_are_scheduled(tokenizer, pipeline, twelve, scheduler):
    """Preempted ones are prefilled again, their output included."""
    _, matches = FORMATS["json_schema"]
    answers, num_preemptions = ask_demo(tokenizer, pipeline, ask_for_twelve, **scheduler)
    assert answers == twelve
    assert (num_preemptions > 0) == ("num_blocks" in scheduler)
    assert all(matches(text) for text, reason in answers if reason == "stop")
    assert sum(reason == "stop" for _, reason in answers) >= 6


def test_nothing_is_kept_of_outputs_that_ended_or_were_given_up(tokenizer, pipeline):
    wanted, _ = FORMATS["json_schema"]
    grammars = pipeline._workers[-1]._grammars

    async def scenario(service, client):
        for number in range(3):
            stream = await client.chat.completions.create(
                model=MODEL, messages=CHAT, n=8, stream=True, extra_body=wanted
            )
            await anext(stream)
            await stream.close()
            await service.until_idle()
            await texts_of(client, is_chat=True, is_streamed=False, n=4, extra_body=wanted)
            assert len(grammars) <= 4, number
        # What ended last is told with the next micro-batch, whatever it is of.
        await client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        return len(grammars)

    grammars.clear()
    assert ask_demo(tokenizer, pipeline, scenario) == 0


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: y"}}, "structured_outputs", 'name: "y"'),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs", "GBNF"),
        ({"structured_outputs": {"grammar": "\n" * 32_000}}, "structured_outputs", "'root'"),
        (
            {"structured_outputs": {"grammar": "\n" * 200_000}},
            "structured_outputs",
            "limit is 32768",
        ),
        (
            {"structured_outputs": {"grammar": "\n" * 400_000}},
            "structured_outputs",
            "limit is 262144",
        ),
        ({"structured_outputs": {"json": "1" * 400_000}}, "structured_outputs", "limit is 262144"),
        (
            {"structured_outputs": {"choice": ["a" * 400_000]}},
            "structured_outputs",
            "limit is 262144",
        ),
        (
            {"structured_outputs": {"choice": ["a", "a" * 70_000]}},
            "structured_outputs",
            "has 70000 characters; the limit is 65536",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "no"}}}, "structured_outputs", "type: no"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs", "surrogate"),
        ({"structured_outputs": {"regex": "a" * 2**18}}, "structured_outputs", "limit is 262144"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "is not supported",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 or more"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend", "not a known"),
        ({"response_format": json_schema({"type": "no"})}, "response_format", "Invalid type: no"),
        ({"response_format": json_schema({"$ref": "#"})}, "response_format", "no output can match"),
        ({"response_format": json_schema({"not": {}})}, "response_format", "Unimplemented keys"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "have a json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format",
            "only then",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "give one of them",
        ),
        (
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            "leave one of them out",
        ),
    ],
)
@pytest.mark.parametrize("path", BODIES)
def test_what_no_output_can_follow_is_refused_with_the_reason(
    tokenizer, pipeline, path, body, param, words
):
    async def scenario(service, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post(
                path.removeprefix("/v1"),
                body=None,
                options={"headers": {"Content-Type": "application/json"}},
                content=json.dumps(BODIES[path] | body).encode(),
                cast_to=object,
            )
        assert service.requests == []
        return caught.value

    error = ask_demo(tokenizer, pipeline, scenario)
    assert (error.status_code, error.param) == (400, param)
    assert words in error.message


def test_a_schema_as_large_as_a_body_is_refused_before_it_is_worked_on():
    wanted = StructuredOutputs(json={"enum": [[]] * (MAX_BODY_BYTES // 3)})
    begin = time.process_time()
    with pytest.raises(InvalidRequestError, match="limit is 262144"):
        output_grammar(None, wanted)
    assert time.process_time() - begin < 0.5


def test_a_model_without_an_end_token_says_that_it_cannot(pipeline):
    tokenizer = Tokenizer.load(DEMO_MODEL)
    tokenizer.stop_token_ids = frozenset()

    async def scenario(_, client):
        with pytest.raises(openai.BadRequestError, match="no token that ends an output"):
            await client.chat.completions.create(
                model=MODEL, messages=CHAT, response_format={"type": "json_object"}
            )

    ask_demo(tokenizer, pipeline, scenario)


class FailingPipeline(ScriptedPipeline):
    """A stage that at some point cannot follow a grammar any more."""

    async def next_result(self):
        batch = self._queue[0]
        result = await super().next_result()
        sampled = [item for item in batch.sequences if item.sampling is not None]
        failed = (i for i, item in enumerate(sampled) if item.sampling.grammar and item.end > 9)
        return replace(result, failures=tuple((index, "the parser is full") for index in failed))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_grammar_that_cannot_be_followed_further_fails_its_request_alone(
    tokenizer, ring, is_streamed
):
    async def main():
        pipeline = FailingPipeline(tokenizer.encode("ab"))
        async with openai_client(tokenizer, "", pipeline=pipeline, ring=ring) as (service, client):

            async def ask(**options):
                body = {"model": MODEL, "prompt": [5] * 7, "max_tokens": 20, **options}
                answer = await client.completions.create(**body, stream=is_streamed)
                if not is_streamed:
                    return answer.choices[0].text
                return "".join([chunk.choices[0].text async for chunk in answer])

            regex = {"structured_outputs": {"regex": "(ab)+"}}
            failed, text = await asyncio.gather(
                ask(extra_body=regex), ask(), return_exceptions=True
            )
            await service.until_idle()
            return failed, text

    failed, text = asyncio.run(main())
    assert "the parser is full" in str(failed)
    assert failed.code == "request_breaks_engine"
    assert isinstance(failed, openai.APIError if is_streamed else openai.BadRequestError)
    assert text == "ab" * 20


LONG = "".join(f"{number} sheep, " for number in range(600))
CHOICES = {
    "many texts": [f"text {number}" for number in range(5000)],
    "long texts that begin alike": [LONG + f"and dog {number}" for number in range(25)],
    "long beginnings that some share": [
        LONG,
        LONG + "!",
        LONG[:99],
        LONG[:99] + "?",
        "a",
        "",
        "ab",
    ],
    "a long text": ["no", "a" * 65_536],
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_each_text_of_a_choice_can_be_said_and_nothing_else(tokenizer, choice):
    grammar = StructuredOutputs(choice=choice).llguidance_grammar
    matcher = tokenizer.grammars.compile(grammar)
    for text in (*choice[:3], *choice[-3:]):
        follower = matcher.deep_copy()
        assert follower.consume_tokens(tokenizer.encode(text)), follower.get_error()
        assert follower.is_accepting()
        follower = matcher.deep_copy()
        assert not follower.consume_tokens(tokenizer.encode(text + " more"))
