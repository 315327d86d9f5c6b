"""Which tokens may come next, by the grammar of an output and the tokens it has."""

import json
import math
import multiprocessing
import threading
import time

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, grammar_from

from gllm_ray.errors import ConfigError, InvalidRequestError
from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model.constraints import RunningGrammars
from gllm_ray.model.generation_config import MAX_TEMPERATURE
from gllm_ray.model.grammar import GrammarCompiler
from gllm_ray.model.next_tokens import draw_tokens
from gllm_ray.model.running_outputs import RunningOutputs
from gllm_ray.model.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "kind": {"enum": ["cat", "dög"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
GRAMMARS = [
    LLMatcher.grammar_from_json_schema(SCHEMA, defaults={"whitespace_flexible": False}),
    grammar_from("regex", r"[a-c]{2,5}(é|€)?"),
    grammar_from("choice", json.dumps(["yes", "no", "yes, but"])),
    grammar_from("lark", 'start: "(" start ")" | "x"'),
]
MORE_ROWS = 37  # as embeddings are padded
TOKENIZER = Tokenizer.load("package://gllm_ray/demo/model")
VOCAB_SIZE = TOKENIZER.vocab_size + MORE_ROWS
(END,) = TOKENIZER.stop_token_ids


def tokens_from(text):
    """Those whose own text begins with it."""
    bytes_of = TOKENIZER.vocabulary.text_bytes
    return [
        token for token in range(TOKENIZER.vocab_size) if bytes_of(token).startswith(text.encode())
    ]


def running():
    return RunningGrammars(lambda: TOKENIZER.grammars)


def sequence(seq_id, grammar, output=None, **sampling):
    """What a micro-batch tells; an output only where a prompt ends."""
    return ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=0,
        token_ids=(5,),
        block_table=(0,),
        sampling=SamplingParams(grammar=grammar, **sampling),
        output_token_ids=output,
    )


def draw(logits, batch, grammars):
    return draw_tokens(logits, batch, grammars, RunningOutputs())


def batch_of(*sequences, ended=()):
    return MicroBatch(batch_id=0, sequences=sequences, ended=ended)


def allowed(grammars, item):
    """The ids that may come next."""
    logits, failures = grammars.restrict(torch.zeros(1, VOCAB_SIZE), {0: item})
    assert failures == {}
    return logits[0].isfinite().nonzero().flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAMMARS), st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_matcher_made_anew_from_the_output_allows_what_one_that_advanced_does(
    grammar, random, num_others
):
    grammars, anew, output = running(), running(), []
    item = sequence(0, grammar, ())
    for seq_id in range(1, num_others + 1):  # that stand elsewhere in the same grammar
        grammars.restrict(torch.zeros(1, VOCAB_SIZE), {0: sequence(seq_id, grammar, ())})
    while not output or (output[-1] != END and len(output) < 60):
        ids = allowed(grammars, item)
        assert ids == allowed(anew, sequence(0, grammar, tuple(output)))
        assert max(ids) < TOKENIZER.vocab_size
        output.append(END if END in ids and random.random() < 0.5 else random.choice(ids))
        assert grammars.advance({0: item}, output[-1:]) == {}
        item = sequence(0, grammar)
    if output[-1] != END:
        return
    # What comes after the end, as in the ring, is nobody's, and changes nothing.
    assert len(allowed(grammars, item)) == VOCAB_SIZE
    assert grammars.advance({0: item}, [7]) == {}
    text = TOKENIZER.decode(output[:-1])
    if grammar == GRAMMARS[0]:
        jsonschema.validate(json.loads(text), SCHEMA)
    if grammar == GRAMMARS[2]:
        assert text in ("yes", "no", "yes, but")


def test_only_an_end_token_may_follow_a_complete_output():
    grammars = running()
    output = tuple(TOKENIZER.encode("yes, but"))
    assert allowed(grammars, sequence(0, GRAMMARS[2], output)) == [END]
    assert END in allowed(grammars, sequence(0, GRAMMARS[2], tuple(TOKENIZER.encode("yes"))))
    assert END not in allowed(grammars, sequence(0, GRAMMARS[2], tuple(TOKENIZER.encode("y"))))


def test_the_end_tokens_are_those_of_the_model():
    compiler = GrammarCompiler(TOKENIZER._backend.to_str(), frozenset({3, 7}))
    grammars = RunningGrammars(lambda: compiler)
    item = sequence(0, GRAMMARS[2], tuple(TOKENIZER.encode("no")))
    assert allowed(grammars, item) == [3, 7]
    assert grammars.advance({0: item}, [7]) == {}
    assert len(allowed(grammars, sequence(0, GRAMMARS[2]))) == VOCAB_SIZE


@pytest.mark.parametrize("complete", ["no", "yes"])
def test_an_end_token_that_is_a_text_too_ends_only_what_is_complete(complete):
    (text_end,) = TOKENIZER.encode(complete[0])
    compiler = GrammarCompiler(TOKENIZER._backend.to_str(), frozenset({text_end}))
    grammars = RunningGrammars(lambda: compiler)
    assert text_end not in allowed(grammars, sequence(0, GRAMMARS[2], ()))
    item = sequence(0, GRAMMARS[2], tuple(TOKENIZER.encode(complete)))
    assert text_end in allowed(grammars, item)
    assert grammars.advance({0: item}, [text_end]) == {}
    assert len(allowed(grammars, sequence(0, GRAMMARS[2]))) == VOCAB_SIZE


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 50}, {"temperature": MAX_TEMPERATURE}],
)
def test_rows_without_a_grammar_draw_as_if_they_were_alone(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB_SIZE, generator=generator) * 3
    before = logits.clone()
    plain = [sequence(i, "", num_logprobs=3, seed=i, **options) for i in (0, 2, 4)]
    bound = [sequence(i, GRAMMARS[1], (), num_logprobs=3, seed=i, **options) for i in (1, 3, 5)]
    mixed = [item for pair in zip(plain, bound, strict=True) for item in pair]
    together = draw(logits, batch_of(*mixed), running())
    assert torch.equal(logits, before)
    alone = draw(logits[::2], batch_of(*plain), running())
    assert together.token_ids[::2] == alone.token_ids
    assert together.logprobs[::2] == alone.logprobs
    for row in (1, 3, 5):
        assert TOKENIZER.vocabulary.token_bytes(together.token_ids[row])[:1] in b"abc"
        # Log probabilities are the model's, whatever the grammar rules out.
        expected = logits[row].log_softmax(-1)
        assert together.logprobs[row].logprob == pytest.approx(
            expected[together.token_ids[row]].item(), abs=1e-5
        )
        assert together.logprobs[row].top[0][0] == expected.argmax().item()


def test_greedy_takes_the_likeliest_token_that_may_come():
    logits = torch.zeros(1, VOCAB_SIZE)
    (no,) = TOKENIZER.encode("no")
    logits[0, 99], logits[0, no] = 9.0, 1.0
    drawn = draw(logits, batch_of(sequence(0, GRAMMARS[2], ())), running())
    assert drawn.token_ids == (no,)


def test_what_ended_is_forgotten_and_what_is_not_known_breaks():
    grammars = running()
    items = [sequence(seq_id, GRAMMARS[2], ()) for seq_id in range(4)]
    logits = torch.zeros(4, VOCAB_SIZE)
    draw(logits, batch_of(*items), grammars)
    assert len(grammars) == 4
    draw(logits[:1], batch_of(sequence(3, GRAMMARS[2]), ended=(0, 2, 99)), grammars)
    assert len(grammars) == 2
    with pytest.raises(KeyError):
        draw(logits[:1], batch_of(sequence(0, GRAMMARS[2])), grammars)
    grammars.clear()
    assert len(grammars) == 0


def test_a_sequence_whose_grammar_cannot_go_on_fails_alone():
    grammars = running()
    items = [sequence(seq_id, GRAMMARS[2], (), temperature=1.0) for seq_id in range(3)]
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1] = math.nan  # so that a token is drawn which may not come
    drawn = draw(logits, batch_of(*items), grammars)
    ((row, reason),) = drawn.failures
    assert row == 1
    assert "doesn't satisfy the grammar" in reason
    after = [sequence(seq_id, GRAMMARS[2]) for seq_id in range(3)]
    drawn = draw(torch.zeros(3, VOCAB_SIZE), batch_of(*after), grammars)
    assert drawn.failures == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "rules",
    [
        LogitRules(allowed_token_ids=(END, *TOKENIZER.encode("maybe"))),
        LogitRules(bad_words=tuple((token,) for text in "ny" for token in tokens_from(text))),
    ],
    ids=["allowed", "bad"],
)
def test_a_sequence_that_grammar_and_rules_leave_no_token_fails_by_the_rules(rules, temperature):
    options = {"temperature": temperature, "logit_rules": rules}
    items = sequence(0, GRAMMARS[2], (), **options), sequence(1, GRAMMARS[2], ())
    drawn = draw(torch.zeros(2, VOCAB_SIZE), batch_of(*items), running())
    ((row, reason),) = drawn.failures
    assert row == 0
    assert reason.startswith("no token is left that may come next: allowed_token_ids, bad_words")


@pytest.mark.parametrize("rules", [None, LogitRules(allowed_token_ids=(END, 7))])
def test_a_stage_that_finds_no_tokenizer_fails_the_sequence_and_goes_on(rules):
    def load():
        raise ConfigError("no usable tokenizer at /where/it/was")

    grammars = RunningGrammars(load)
    items = sequence(0, GRAMMARS[2], (), logit_rules=rules), sequence(1, "")
    drawn = draw(torch.zeros(2, VOCAB_SIZE), batch_of(*items), grammars)
    assert drawn.failures == ((0, "grammars cannot be followed by this service now"),)
    after = sequence(0, GRAMMARS[2]), sequence(1, "")
    assert draw(torch.zeros(2, VOCAB_SIZE), batch_of(*after), grammars).failures == ()


def test_the_compiler_is_loaded_for_the_first_grammar_and_not_before():
    calls = []

    def load():
        calls.append(1)
        return TOKENIZER.grammars

    grammars = RunningGrammars(load)
    logits = torch.zeros(1, VOCAB_SIZE)
    draw(logits, batch_of(sequence(0, "")), grammars)
    assert calls == []
    for seq_id in (1, 2):
        draw(logits, batch_of(sequence(seq_id, GRAMMARS[1], ())), grammars)
    assert calls == [1]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (grammar_from("regex", "(a"), "unclosed group"),
        (grammar_from("lark", "start: y"), 'unknown name: "y"'),
        (grammar_from("json_schema", '{"type": "objct"}'), "Invalid type: objct"),
        (grammar_from("json_schema", "false"), "Unsatisfiable schema"),
        (grammar_from("json_schema", '{"$ref": "#"}'), "no output can match it"),
        (grammar_from("lark", "start: A\nA: /a/ & /b/"), "no output can match it"),
    ],
)
def test_a_grammar_with_a_mistake_is_refused_with_the_reason(grammar, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        TOKENIZER.grammars.compile(grammar)


def chain(num_rules):
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(num_rules))
    return grammar_from("lark", f'start: r0\n{rules}r{num_rules}: "a"')


def chained_schema(num_schemas):
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(num_schemas)}
    defs[f"d{num_schemas}"] = {"const": 1}
    return LLMatcher.grammar_from_json_schema({"$ref": "#/$defs/d0", "$defs": defs})


def follow_deep_grammars():
    """Compile grammars and draw by them; in a process of its own, which an overflow ends."""
    for grammar in (chain(20_000), chained_schema(5_000)):
        item = sequence(0, grammar, ())
        assert draw(torch.zeros(1, VOCAB_SIZE), batch_of(item), running()).failures == ()


def test_grammars_as_deep_as_requests_may_have_them_do_not_overflow_the_stack():
    process = multiprocessing.get_context("spawn").Process(target=follow_deep_grammars)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_compiling_leaves_the_stack_of_other_threads_as_it_is():
    before = threading.stack_size()
    TOKENIZER.grammars.compile(grammar_from("regex", "[x-z]+"))
    assert threading.stack_size() == before


def test_a_grammar_of_so_many_meanings_that_masks_take_seconds_fails():
    rule = " | ".join("s " * count for count in range(2, 6))
    grammar = grammar_from("lark", f"start: s\ns: {rule}| /[a-z ]/ |")
    grammars = running()
    output = tuple(TOKENIZER.encode("a b c and the cat sat on the mat"))
    item = sequence(0, grammar, output)
    grammars.restrict(torch.zeros(1, VOCAB_SIZE), {0: item})
    assert "Too many items" in grammars.advance({0: item}, [output[0]])[0]


def test_a_regular_expression_that_takes_too_much_work_is_refused_early():
    begin = time.process_time()
    with pytest.raises(InvalidRequestError, match="lexer"):
        TOKENIZER.grammars.compile(grammar_from("regex", "(ab?)?" * 40_000))
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "x"),
        ({}, ["x"]),
        ({"type": "array", "items": {"type": "string"}}, ["x", "y"]),
        ({"type": "object", "properties": {"a": {}, "b": {}}}, {"b": 1}),
    ],
    ids=str,
)
def test_an_object_of_500_optional_properties_is_followed(schema, value, is_open):
    properties = {f"p{i}": schema for i in range(500)}
    grammar = LLMatcher.grammar_from_json_schema(
        {"type": "object", "properties": properties, "additionalProperties": is_open}
    )
    matcher = TOKENIZER.grammars.compile(grammar)
    for token_id in TOKENIZER.encode(json.dumps({f"p{i}": value for i in range(0, 500, 45)})):
        matcher.compute_bitmask()
        assert matcher.consume_token(token_id), matcher.get_error()
    assert matcher.is_accepting()


def test_a_schema_of_many_meanings_is_followed():
    item = {"$ref": "#/$defs/item"}
    kinds = [{"type": "object", "properties": {"x": item, f"y{i}": item}} for i in range(300)]
    schema = {**item, "$defs": {"item": {"anyOf": kinds}}}
    matcher = TOKENIZER.grammars.compile(LLMatcher.grammar_from_json_schema(schema))
    for token_id in TOKENIZER.encode('{"x": {"x": {"x": {"x": {"y1": {"x": {}}}}}}}'):
        matcher.compute_bitmask()
        assert matcher.consume_token(token_id), matcher.get_error()


@pytest.mark.parametrize("text", ["<|end|>", "é<|system|>!", "<|user|><|end|>"])
def test_a_text_that_spells_a_special_token_is_drawn_by_other_tokens(text):
    grammar = grammar_from("lark", f"start: {json.dumps(text)}")
    assert drawn_text(grammar) == text


def test_a_grammar_may_name_a_special_token():
    assert drawn_text(grammar_from("lark", 'start: "a" <|system|> "b"')) == "a<|system|>b"


def drawn_text(grammar):
    """What is drawn until the end token, special tokens by their names."""
    grammars, ids = running(), []
    item = sequence(0, grammar, ())
    while ids[-1:] != [END]:
        drawn = draw(torch.zeros(1, VOCAB_SIZE), batch_of(item), grammars)
        assert drawn.failures == ()
        ids += drawn.token_ids
        item = sequence(0, grammar)
    return b"".join(map(TOKENIZER.vocabulary.token_bytes, ids[:-1])).decode()


@pytest.mark.parametrize(
    ("tokenizer_json", "end_token_ids", "reason"),
    [
        (TOKENIZER._backend.to_str(), frozenset(), "no token that ends an output"),
        (TOKENIZER._backend.to_str(), frozenset({10**6}), "out of range"),
        ("{}", frozenset({1}), "not with this model's tokenizer"),
    ],
)
def test_a_model_whose_tokens_cannot_follow_grammars_says_so(tokenizer_json, end_token_ids, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        GrammarCompiler(tokenizer_json, end_token_ids)
