"""What the rules of a request do to the logits, and to the tokens that are drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model import sampler
from gllm_ray.model.constraints import RunningGrammars
from gllm_ray.model.generation_config import MAX_TEMPERATURE
from gllm_ray.model.logit_changes import LogitChanges
from gllm_ray.model.next_tokens import draw_tokens
from gllm_ray.model.running_outputs import RunningOutputs
from gllm_ray.model.token_counts import TokenCounts

VOCAB_SIZE = 40
PROMPT_LEN = 3

tokens = st.integers(0, VOCAB_SIZE - 1)
biases = st.dictionaries(tokens, st.floats(-100, 100), max_size=6)
penalties = st.sampled_from([0.0, 0.5, -1.25, 2.0])
some_tokens = st.lists(tokens, min_size=1, max_size=30, unique=True).map(tuple)
# Of few tokens, so that outputs come near to them.
bad_words = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=6, unique=True
).map(tuple)
rules = st.builds(
    LogitRules,
    allowed_token_ids=st.just(()) | some_tokens,
    bad_words=bad_words,
    end_token_ids=st.lists(tokens, max_size=4, unique=True).map(tuple),
    min_end=st.integers(0, 12),
    logit_bias=biases.map(lambda found: tuple(found.items())),
    repetition_penalty=st.sampled_from([1.0, 1.05, 0.5, 3.0]),
    frequency_penalty=penalties,
    presence_penalty=penalties,
)
prompts = st.lists(tokens, min_size=PROMPT_LEN, max_size=PROMPT_LEN)
outputs = st.lists(tokens | st.integers(0, 3), max_size=8)


def no_grammars():
    return RunningGrammars(lambda: pytest.fail("no grammar is asked for"))


def sequence(seq_id, logit_rules, prompt, output, *, is_new=True, **sampling):
    """One that draws the token after its output; where it is new, told of all that there is."""
    params = SamplingParams(logit_rules=logit_rules, **sampling)
    is_told = is_new and params.needs_output
    return ScheduledSequence(
        seq_id=seq_id,
        epoch=0,
        start=len(prompt) + len(output) - 1,
        token_ids=(5,),
        block_table=(0,),
        sampling=params,
        output_token_ids=tuple(output) if is_told else None,
        prompt_token_ids=tuple(set(prompt)) if is_told and params.needs_prompt else (),
    )


def logits_of(num_rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 4).to(dtype)


def changed_by_hand(row, rule, prompt, output):
    """One row, token by token, in vLLM's order."""
    found = row.float().tolist()
    for token_id in range(VOCAB_SIZE):
        logit = found[token_id]
        if rule.allowed_token_ids and token_id not in rule.allowed_token_ids:
            logit = -math.inf
        if any(ends_with([*output, token_id], word) for word in rule.bad_words):
            logit = -math.inf
        if token_id in rule.end_token_ids and len(prompt) + len(output) < rule.min_end:
            logit = -math.inf
        logit += dict(rule.logit_bias).get(token_id, 0)
        if token_id in prompt or token_id in output:
            penalty = rule.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= rule.frequency_penalty * output.count(token_id)
        logit -= rule.presence_penalty * (token_id in output)
        found[token_id] = logit
    return torch.tensor(found)


def ends_with(output, word):
    return tuple(output[-len(word) :]) == word


def apply(logits, *sequences, counts=None):
    """All rows, changed as they would be for their draw."""
    changed = logits.float().clone()
    changes = LogitChanges.of(sequences, counts if counts is not None else RunningOutputs())
    changes.apply(changed, range(len(sequences)))
    return changed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(rules | st.none(), prompts, outputs), min_size=1, max_size=5))
def test_each_row_changes_by_its_own_rules_as_vllm_has_them(rows):
    logits = logits_of(len(rows))
    sequences = [sequence(seq_id, *row) for seq_id, row in enumerate(rows)]
    changed = apply(logits, *sequences)
    for row, after, (rule, prompt, output) in zip(logits, changed, rows, strict=True):
        expected = row if rule is None else changed_by_hand(row, rule, prompt, output)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(prompts, outputs, st.sampled_from([0.7, 1.05, 1.3]))
def test_a_repetition_penalty_is_that_of_transformers(prompt, output, penalty):
    logits = logits_of(1)
    seen = torch.tensor([[*prompt, *output]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    item = sequence(0, LogitRules(repetition_penalty=penalty), prompt, output)
    assert torch.equal(apply(logits, item), expected)


@settings(max_examples=100, deadline=None)
@given(prompts, outputs, st.integers(0, 9), st.lists(tokens, min_size=1, unique=True))
def test_a_least_length_is_that_of_transformers(prompt, output, min_tokens, ends):
    logits = logits_of(1)
    processor = MinNewTokensLengthLogitsProcessor(PROMPT_LEN, min_tokens, ends)
    expected = processor(torch.tensor([[*prompt, *output]]), logits.clone())
    rule = LogitRules(end_token_ids=tuple(ends), min_end=PROMPT_LEN + min_tokens)
    assert torch.equal(apply(logits, sequence(0, rule, prompt, output)), expected)


@settings(max_examples=50, deadline=None)
@given(biases.filter(bool))
def test_a_bias_is_that_of_transformers(bias):
    logits = logits_of(1)
    processor = SequenceBiasLogitsProcessor([[[token_id], bias[token_id]] for token_id in bias])
    expected = processor(torch.tensor([[1]]), logits.clone())
    rule = LogitRules(logit_bias=tuple(bias.items()))
    assert torch.equal(apply(logits, sequence(0, rule, [1, 2, 3], [])), expected)


@settings(max_examples=100, deadline=None)
@given(prompts, outputs, bad_words.filter(bool))
def test_bad_words_are_those_of_transformers(prompt, output, words):
    logits = logits_of(1)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words])
    # It skips words longer than what it is told of, which is the output here.
    so_far = torch.tensor([[VOCAB_SIZE] * 3 + output])
    item = sequence(0, LogitRules(bad_words=words), prompt, output)
    assert torch.equal(apply(logits, item), processor(so_far, logits.clone()))


@settings(max_examples=50, deadline=None)
@given(some_tokens)
def test_allowing_tokens_is_what_suppressing_the_others_is_in_transformers(allowed):
    logits = logits_of(1)
    processor = SuppressTokensLogitsProcessor([*set(range(VOCAB_SIZE)).difference(allowed)])
    item = sequence(0, LogitRules(allowed_token_ids=allowed), [1, 2, 3], [])
    assert torch.equal(apply(logits, item), processor(torch.tensor([[1]]), logits.clone()))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(rules, prompts, outputs), min_size=1, max_size=3),
    st.lists(st.booleans(), max_size=30),
    st.integers(0, 9),
)
def test_what_grows_with_an_output_is_what_is_begun_anew_from_it(rows, restarts, seed):
    """Some sequences begin again between draws, as after a preemption."""
    counts = RunningOutputs()
    outputs = [list(output) for _, _, output in rows]
    is_new = True
    for step, restarted in enumerate([*restarts, True]):
        so_far = [(*row[:2], output) for row, output in zip(rows, outputs, strict=True)]
        sequences, anew = (
            [
                sequence(seq_id, *row, is_new=new, temperature=1.0, seed=seed)
                for seq_id, row in enumerate(so_far)
            ]
            for new in (is_new, True)
        )
        logits = logits_of(len(rows), seed=step)
        batch = MicroBatch(batch_id=step, sequences=tuple(sequences))
        fresh = batch_drawn_alone(logits, anew)
        drawn = draw_tokens(logits, batch, no_grammars(), counts)
        assert drawn.token_ids == fresh
        for output, token_id in zip(outputs, drawn.token_ids, strict=True):
            output.append(token_id)
        is_new = restarted
    assert len(counts) == sum(rule.needs_output for rule, *_ in rows)


def batch_drawn_alone(logits, sequences):
    """What each draws in a micro-batch of its own, at a stage that knows nothing yet."""
    return tuple(
        draw_tokens(
            logits[row : row + 1],
            MicroBatch(batch_id=0, sequences=(item,)),
            no_grammars(),
            RunningOutputs(),
        ).token_ids[0]
        for row, item in enumerate(sequences)
    )


RULE = LogitRules(
    allowed_token_ids=tuple(range(30)),
    bad_words=((6, 6, 9), (6, 1, 9), (0,)),
    end_token_ids=(1, 2),
    min_end=10,
    logit_bias=((7, 3.0),),
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.25,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}], ids=str
)
def test_a_draw_is_that_from_the_changed_logits_and_tells_of_the_models_own(dtype, options):
    logits = logits_of(8, dtype=dtype)
    before = logits.clone()
    options = options | {"num_logprobs": 2}
    sequences = [
        sequence(i, RULE if i % 2 else None, [3, 4, 5], [6, 6, i], seed=i, **options)
        for i in range(8)
    ]
    batch = MicroBatch(batch_id=0, sequences=tuple(sequences))
    drawn = draw_tokens(logits, batch, no_grammars(), RunningOutputs())
    assert torch.equal(logits, before), "the model's own are told of"
    params = [replace(item.sampling, logit_rules=None) for item in sequences]
    by_hand = torch.stack(
        [
            changed_by_hand(row, RULE, [3, 4, 5], [6, 6, i]) if i % 2 else row.float()
            for i, row in enumerate(logits)
        ]
    )
    positions = [item.end for item in sequences]
    assert drawn.token_ids == sampler.sample(by_hand, params, positions)
    for row, token_id, told in zip(logits, drawn.token_ids, drawn.logprobs, strict=True):
        expected = row.float().log_softmax(-1)
        assert told.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
        assert told.top[0][1] == pytest.approx(expected.max().item(), abs=1e-5)


def test_parts_of_many_rows_change_by_their_own_rules(monkeypatch):
    sequences = [
        sequence(i, RULE if i % 3 else None, [3, 4, 5], [6, i % 5], seed=i, temperature=i % 2 * 1.0)
        for i in range(11)
    ]
    batch = MicroBatch(batch_id=0, sequences=tuple(sequences))
    logits = logits_of(11)
    whole = draw_tokens(logits, batch, no_grammars(), RunningOutputs())
    monkeypatch.setattr(sampler, "_MAX_WORKSPACE", 2 * VOCAB_SIZE)
    assert draw_tokens(logits, batch, no_grammars(), RunningOutputs()) == whole
    assert whole.token_ids == batch_drawn_alone(logits, sequences)


def test_a_small_difference_is_not_lost_to_the_logits_type():
    logits = torch.zeros(1, VOCAB_SIZE, dtype=torch.bfloat16)
    logits[0, :9] = 100.0
    item = sequence(0, LogitRules(logit_bias=((8, 0.001),)), [1, 2, 3], [])
    batch = MicroBatch(batch_id=0, sequences=(item,))
    assert draw_tokens(logits, batch, no_grammars(), RunningOutputs()).token_ids == (8,)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_however_extreme_a_penalty_is_a_token_is_drawn(penalty, temperature):
    logits = logits_of(1)
    logits[0, 3] = 0.0
    item = sequence(
        0, LogitRules(repetition_penalty=penalty), [3, 4, 5], [6], temperature=temperature
    )
    batch = MicroBatch(batch_id=0, sequences=(item,))
    (token_id,) = draw_tokens(logits, batch, no_grammars(), RunningOutputs()).token_ids
    assert 0 <= token_id < VOCAB_SIZE


@pytest.mark.parametrize("penalty", [1e-300, 1e-46, 1e39, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0, MAX_TEMPERATURE])
def test_what_may_not_come_does_not_however_extreme_a_penalty_is(penalty, temperature):
    rule = LogitRules(end_token_ids=(7,), min_end=100, repetition_penalty=penalty)
    item = sequence(0, rule, [1, 2, 3], [7], temperature=temperature)
    batch = MicroBatch(batch_id=0, sequences=(item,))
    drawn = draw_tokens(logits_of(1), batch, no_grammars(), RunningOutputs())
    assert drawn.token_ids != (7,)


def test_tokens_beyond_the_logits_change_nothing():
    beyond = LogitRules(
        allowed_token_ids=(*range(VOCAB_SIZE), VOCAB_SIZE + 2),
        bad_words=((VOCAB_SIZE + 1,), (3, VOCAB_SIZE)),
        end_token_ids=(VOCAB_SIZE, 2),
        min_end=99,
        logit_bias=((VOCAB_SIZE + 3, 9.0), (7, 1.0)),
        repetition_penalty=1.2,
        presence_penalty=1.0,
    )
    inside = beyond._replace(
        allowed_token_ids=(), bad_words=(), end_token_ids=(2,), logit_bias=((7, 1.0),)
    )
    logits = logits_of(1)
    changed = apply(logits, sequence(0, beyond, [3, VOCAB_SIZE, 4], [VOCAB_SIZE + 1, 5]))
    assert torch.equal(changed, apply(logits, sequence(0, inside, [3, 4], [5])))


OPTIONS = [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=50, deadline=None)
@given(st.lists(rules, min_size=1, max_size=3), st.integers(0, 9))
def test_only_what_is_allowed_is_drawn_and_no_bad_word_or_the_row_fails(options, drawn_by, seed):
    running = RunningOutputs()
    drawn = [[] for _ in drawn_by]
    for step in range(12):
        sequences, anew = (
            [
                sequence(row, rule, [4, 5, 6], output, is_new=is_new, seed=seed, **options)
                for row, (rule, output) in enumerate(zip(drawn_by, drawn, strict=True))
            ]
            for is_new in (not step, True)
        )
        batch = MicroBatch(batch_id=step, sequences=tuple(sequences))
        logits = logits_of(len(sequences), seed=step + seed)
        said = draw_tokens(logits, batch, no_grammars(), running)
        left = apply(logits, *anew)
        assert [row for row, _ in said.failures] == [
            row for row, changed in enumerate(left) if changed.isinf().all()
        ]
        for row, token_id in enumerate(said.token_ids):
            assert row in dict(said.failures) or left[row, token_id] > -math.inf
            drawn[row].append(token_id)


def test_a_row_that_has_no_token_left_says_which_rules_to_relax():
    rule = LogitRules(allowed_token_ids=(7, 8), bad_words=((7,),), end_token_ids=(8,), min_end=9)
    items = sequence(0, rule._replace(min_end=0), [1, 2, 3], []), sequence(1, rule, [1, 2, 3], [])
    batch = MicroBatch(batch_id=0, sequences=items)
    drawn = draw_tokens(logits_of(2), batch, no_grammars(), RunningOutputs())
    assert drawn.token_ids[0] == 8
    ((row, why),) = drawn.failures
    assert row == 1
    assert "allowed_token_ids, bad_words, min_tokens" in why


def test_nothing_is_looked_at_where_no_rule_applies_any_more():
    over = LogitRules(end_token_ids=(1,), min_end=4)
    sequences = [sequence(0, over, [1, 2, 3], [4]), sequence(1, None, [1, 2, 3], [])]
    assert LogitChanges.of(sequences, RunningOutputs()).rows == ()


def test_what_ended_is_forgotten_and_what_is_not_known_breaks():
    counts = RunningOutputs()
    rule = LogitRules(presence_penalty=1.0)
    logits = logits_of(1)

    def draw(item, ended=()):
        batch = MicroBatch(batch_id=0, sequences=(item,), ended=ended)
        draw_tokens(logits, batch, no_grammars(), counts)

    for seq_id in range(3):
        draw(sequence(seq_id, rule, [1, 2, 3], []))
    assert len(counts) == 3
    draw(sequence(1, rule, [1, 2, 3], [], is_new=False), ended=(0, 2, 99))
    assert len(counts) == 1
    with pytest.raises(KeyError):
        draw(sequence(0, rule, [1, 2, 3], [], is_new=False))
    counts.clear()
    assert len(counts) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=50), st.lists(st.integers(0, 99), max_size=99))
def test_counts_hold_each_token_once(prompt, output):
    ids, numbers = TokenCounts(prompt, output).columns
    assert sorted(ids.tolist()) == sorted({*prompt, *output})
    assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == {
        token_id: output.count(token_id) for token_id in {*prompt, *output}
    }
    assert numbers.dtype == np.int32
