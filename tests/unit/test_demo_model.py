import ast
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import gllm_ray.demo
from gllm_ray.demo.corpus import Corpus, docstring_tasks
from gllm_ray.demo.exercises import exercises
from gllm_ray.demo.train import Recipe, TokenStreams, build_model, tokenize, train

MODEL = Path(gllm_ray.demo.__file__).parent / "model"
MIB = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def answer(model, tokenizer, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_plain_transformers_loads_every_weight_as_a_llama():
    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_size_is_three_to_six_million_parameters_in_at_most_12_mib(model):
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 12 * MIB


def test_the_record_matches_the_model(model):
    record = json.loads((MODEL / "training.json").read_text())
    assert record["num_parameters"] == model.num_parameters()
    untrained = torch.tensor(model.config.vocab_size).log()
    for loss in ("training_loss", "held_out_code_loss", "held_out_chat_loss"):
        assert 0 < record[loss] < untrained / 2
    assert record["num_trained_tokens"] == record["steps"] * 4096


def test_eos_ends_a_turn(model, tokenizer):
    assert tokenizer.eos_token == "<|end|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["größe = 'naïve'", "日本語 🎉\n\tx  = 1", "\x00\r\n", " lead", "a , b ."]
)
def test_tokenizer_round_trips_spaces_and_unicode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_renders_each_turn_and_opens_the_answer(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|>"
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == rendered
    assert (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        == rendered + "<|assistant|>"
    )


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(TemplateError, match="wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "?"}], tokenize=False)


def test_a_role_marker_is_one_token(tokenizer):
    for marker in ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer.encode(marker)) == 1


def test_it_adds_two_numbers(model, tokenizer):
    namespace = {}
    exec(answer(model, tokenizer, "Write a function that adds two numbers."), namespace)
    assert namespace["add"](2, 3) == 5


@pytest.mark.parametrize(
    "task",
    ["reverses a string", "returns the largest even number in a list", "reads a text file"],
)
def test_an_answer_is_a_python_function(model, tokenizer, task):
    text = answer(model, tokenizer, f"Write a function that {task}.")
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)


def test_every_exercise_is_one_function_and_is_asked_once():
    pairs = exercises()
    assert len({task for task, _ in pairs}) == len(pairs)
    for task, source in pairs:
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef), task


def test_a_docstring_becomes_a_task_and_its_function_the_answer():
    source = '''
def area(width, height):
    """Compute the area of a rectangle.

    More words.
    """
    return width * height

def undocumented():
    return 1

class Shape:
    def copy(self):
        """Copy the
        shape"""
        return Shape()
'''
    assert sorted(docstring_tasks(source)) == [
        ("computes the area of a rectangle", "def area(width, height):\n    return width * height"),
        ("copies the shape", "def copy(self):\n    return Shape()"),
    ]


@pytest.fixture(scope="module")
def streams(tokenizer) -> TokenStreams:
    modules = [Path(ast.__file__).read_text()[:20_000]]
    conversations = [
        [{"role": "user", "content": task}, {"role": "assistant", "content": source}]
        for task, source in exercises()[:30]
    ]
    return tokenize(Corpus(modules, conversations), tokenizer)


def test_conversations_start_where_the_streams_say(tokenizer, streams):
    (user,) = tokenizer.encode("<|user|>")
    assert len(streams.chat_starts) == 30
    assert all(streams.chat[start] == user for start in streams.chat_starts)


def losses_of(tokenizer, streams, seed: int) -> list[float]:
    torch.manual_seed(seed)
    recipe = Recipe(steps=2, seed=seed, batch_shapes=((4, 32), (2, 64)))
    return list(train(build_model(tokenizer), streams, recipe))


def test_the_seed_alone_decides_a_training_run(tokenizer, streams):
    first = losses_of(tokenizer, streams, seed=1)
    assert first == losses_of(tokenizer, streams, seed=1)
    assert first != losses_of(tokenizer, streams, seed=2)


def test_training_lowers_the_loss(tokenizer, streams):
    torch.manual_seed(0)
    recipe = Recipe(steps=6, seed=0, batch_shapes=((4, 32),))
    losses = list(train(build_model(tokenizer), streams, recipe))
    assert sum(losses[-2:]) < sum(losses[:2])
