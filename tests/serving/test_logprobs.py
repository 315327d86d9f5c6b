"""Log probabilities as OpenAI's client gets them are those that transformers computes."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from gllm_ray.messages import FinishReason, TokenEvent, TokenLogprobs
from gllm_ray.model.checkpoint import find_directory
from gllm_ray.model.tokenizer import Tokenizer
from tests.fakes import LocalService
from tests.serving.demo_api import DEMO_MODEL, ask_demo, start_demo_pipeline
from tests.serving.local_api import CHAT, http_client, openai_over

MODEL = LocalService.model_name
PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


@pytest.fixture(scope="module")
def reference():
    """The log probabilities of every token after each of some tokens, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        find_directory(DEMO_MODEL), dtype=torch.float32
    ).eval()

    def log_probs(prompt_ids, output_ids):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt_ids, *output_ids]])).logits[0]
        first = len(prompt_ids) - 1
        return logits[first : first + len(output_ids)].log_softmax(dim=-1)

    return log_probs


def spelled(tokenizer, token_id):
    """As both routes spell a token."""
    text = tokenizer.vocabulary.token_bytes(token_id)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """The token of each spelling."""
    return {spelled(tokenizer, token_id): token_id for token_id in range(tokenizer.vocab_size)}


def near(value):
    return pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3, "n": 3}])
@pytest.mark.parametrize("ring", [False, True])
def test_those_of_a_chat_are_the_models_own(
    tokenizer, pipeline, reference, ids, is_streamed, options, ring
):
    async def scenario(_, client):
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            max_tokens=12,
            logprobs=True,
            top_logprobs=5,
            stream=is_streamed,
            **options,
        )
        if not is_streamed:
            assert answer.usage.completion_tokens == sum(
                len(choice.logprobs.content) for choice in answer.choices
            )
            return {choice.index: choice.logprobs.content for choice in answer.choices}
        contents = {}
        async for chunk in answer:
            (choice,) = chunk.choices
            if choice.logprobs is not None:
                contents.setdefault(choice.index, []).extend(choice.logprobs.content)
        return contents

    contents = ask_demo(tokenizer, pipeline, scenario, ring=ring)
    assert sorted(contents) == list(range(options.get("n", 1)))
    for content in contents.values():
        output = [ids[token.token] for token in content]
        expected = reference(tokenizer.apply_chat_template(CHAT), output)
        for token, token_id, row in zip(content, output, expected, strict=True):
            assert bytes(token.bytes) == tokenizer.vocabulary.token_bytes(token_id)
            assert token.logprob == near(row[token_id].item())
            top, top_ids = row.topk(5)
            assert [likely.logprob for likely in token.top_logprobs] == [
                near(logprob) for logprob in top.tolist()
            ]
            assert token.top_logprobs[0].token == spelled(tokenizer, top_ids[0].item())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num", [0, 3])
def test_those_of_a_completion_have_the_drawn_token_and_where_it_stands(
    tokenizer, pipeline, reference, ids, num, is_streamed
):
    async def scenario(_, client):
        answer = await client.completions.create(
            model=MODEL,
            prompt=[PROMPT, "import "],
            max_tokens=12,
            temperature=0.9,
            seed=5,
            logprobs=num,
            stream=is_streamed,
        )
        if not is_streamed:
            return [[choice] for choice in answer.choices]
        choices = [chunk.choices[0] async for chunk in answer]
        return [[choice for choice in choices if choice.index == index] for index in range(2)]

    outputs = ask_demo(tokenizer, pipeline, scenario)
    for prompt, parts in zip((PROMPT, "import "), outputs, strict=True):
        told = [part.logprobs for part in parts if part.logprobs is not None]
        text = "".join(part.text for part in parts)
        tokens, logprobs, tops, offsets = (
            [item for part in told for item in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        assert "".join(tokens) == text
        assert len(tokens) == 12
        assert offsets == [len("".join(tokens[:index])) for index in range(12)]
        output = [ids[token] for token in tokens]
        expected = reference(tokenizer.encode(prompt), output)
        for token, logprob, top, row in zip(tokens, logprobs, tops, expected, strict=True):
            assert logprob == top[token] == near(row[ids[token]].item())
            likely = {spelled(tokenizer, token_id) for token_id in row.topk(num).indices.tolist()}
            assert top.keys() == {token, *likely}


def test_an_answer_that_asks_for_none_has_none(tokenizer, pipeline):
    async def scenario(_, client):
        chat = await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3)
        text = await client.completions.create(model=MODEL, prompt="x", max_tokens=3)
        return [answer.choices[0].logprobs for answer in (chat, text)]

    assert ask_demo(tokenizer, pipeline, scenario) == [None, None]


class TellingService:
    """A service that gives every request the same lists of events."""

    model_name = MODEL
    max_model_len = 128

    def __init__(self, tokenizer, steps):
        self.tokenizer = tokenizer
        self._steps = steps

    async def generate(self, request):
        for step in self._steps:
            yield [TokenEvent(request.request_id, **event) for event in step]


@pytest.mark.parametrize("step_size", [1, 2, 5])
@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("a €€ 😀 b", None, "a €€ 😀 b"),
        ("one two three", ["two t", "three"], "one "),
        ("one two three", ["two four"], "one two three"),
    ],
)
def test_text_that_is_held_back_neither_loses_nor_doubles_a_token(
    tokenizer, said, stop, text, step_size
):
    """Characters of several tokens, and what may be a stop string, are held back."""
    ids = tokenizer.encode(said)
    if said.startswith("a"):
        assert len(ids) > len(said), "there are characters of several tokens"
    events = [
        {"token_id": token_id, "logprobs": TokenLogprobs(-float(number), ((token_id, -0.5),))}
        for number, token_id in enumerate(ids, 1)
    ]
    end = max(tokenizer.stop_token_ids)
    last = TokenLogprobs(-99.0, ((end, -0.5),))
    events.append({"token_id": end, "logprobs": last, "finish_reason": FinishReason.STOP})
    steps = [events[first : first + step_size] for first in range(0, len(events), step_size)]

    async def main():
        async with http_client(TellingService(tokenizer, steps)) as http:
            client = openai_over(http)
            options = {"model": MODEL, "prompt": "x", "logprobs": 1, "stop": stop}
            whole = await client.completions.create(**options)
            stream = await client.completions.create(stream=True, **options)
            return whole, [chunk.choices[0] async for chunk in stream]

    whole, chunks = asyncio.run(main())
    (choice,) = whole.choices
    numbers = choice.logprobs.token_logprobs
    assert choice.text == "".join(chunk.text for chunk in chunks) == text
    assert len(numbers) == whole.usage.completion_tokens
    told = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    assert [number for part in told for number in part.token_logprobs] == numbers
    for name in ("tokens", "text_offset", "top_logprobs"):
        parts = [item for part in told for item in getattr(part, name)]
        assert parts == getattr(choice.logprobs, name)
    if stop is None or text == said:
        assert numbers == [*(-float(number) for number in range(1, len(ids) + 1)), -99.0]
        assert choice.logprobs.tokens[-1] == "<|end|>"
        assert choice.logprobs.text_offset[-1] == len(text)
    else:
        assert numbers == [-float(number) for number in range(1, len(numbers) + 1)]
    assert [len(part.tokens) for part in told][:-1] == [step_size] * (len(told) - 1)


@pytest.mark.parametrize(
    ("token", "text"),
    [("\u2581the", b" the"), ("<0xE2>", b"\xe2"), ("plain", b"plain"), ("<s>", b"<s>")],
)
def test_a_token_of_any_tokenizer_has_bytes(tmp_path, token, text):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<unk>", "\u2581the", "<0xE2>", "plain"]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.vocabulary.token_bytes(names.index(token)) == text
    assert tokenizer.vocabulary.token_bytes(99) == b""
