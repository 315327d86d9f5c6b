import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gllm_ray.config import ModelConfig, resolve_package_path
from gllm_ray.errors import ConfigError, InvalidRequestError
from gllm_ray.model.generation_config import SamplingDefaults
from gllm_ray.model.tokenizer import Tokenizer

DEMO = "package://gllm_ray/demo/model"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="module")
def demo_of_transformers():
    return AutoTokenizer.from_pretrained(resolve_package_path(DEMO))


def save_tokenizer(directory: Path, **options: object) -> Path:
    """A byte-level tokenizer that puts <s> before a text."""
    tokens = ["<s>", "</s>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    ).save_pretrained(directory)
    return directory


def write_json(directory: Path, **files: object) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("text", ["", "def f(x):\n    return x", "naïve 😀 €", "<|end|>"])
def test_encoding_is_that_of_transformers(demo, demo_of_transformers, text):
    assert demo.encode(text) == demo_of_transformers.encode(text)


def test_a_chat_is_encoded_as_transformers_does(demo, demo_of_transformers):
    expected = demo_of_transformers.apply_chat_template(CHAT, add_generation_prompt=True)
    assert demo.apply_chat_template(CHAT) == expected["input_ids"]


def test_the_special_tokens_around_a_text_are_those_of_its_tokenizer(tmp_path):
    assert Tokenizer.load(str(save_tokenizer(tmp_path))).encode("ab")[0] == 0


def test_the_tokens_of_a_text_begin_where_it_has_them(demo):
    text = "naïve 😀 €<|end|> x"
    ids = demo.encode(text)
    pieces = [demo.vocabulary.token_bytes(token_id) for token_id in ids]
    whole = [b"".join(pieces[:index]).decode(errors="ignore") for index in range(len(ids))]
    assert demo.text_offsets(ids, text) == [len(before) for before in whole]
    assert any(not piece.isascii() and len(piece) == 1 for piece in pieces)
    assert demo.text_offsets([], "") == []


@pytest.mark.parametrize(
    ("text", "offsets"),
    [("ab€", [0, 0, 1, 2, 2, 2]), ("", [0]), ("a<end>b", [0, 0, 1, 6]), ("é<s>", [0, 0, 0, 1])],
)
def test_special_tokens_have_a_part_in_a_text_that_spells_them_alone(tmp_path, text, offsets):
    tokenizer = Tokenizer.load(str(save_tokenizer(tmp_path)))
    assert tokenizer.text_offsets(tokenizer.encode(text), text) == offsets
    ids = tokenizer.encode(text)
    shown = tokenizer.decode(ids)
    assert shown == "<s>" + text
    assert tokenizer.text_offsets(ids, shown) == [0, *(3 + offset for offset in offsets[1:])]


def test_a_chat_template_writes_its_own_special_tokens(tmp_path):
    save_tokenizer(tmp_path, chat_template="{{ messages[0].content }}<end>")
    ids = Tokenizer.load(str(tmp_path)).apply_chat_template([{"role": "user", "content": "a"}])
    assert (len(ids), ids[-1]) == (2, 2)


def test_truncation_and_padding_of_the_file_do_not_change_a_prompt(tmp_path):
    tokenizer = Tokenizer.load(str(save_tokenizer(tmp_path)))
    assert len(tokenizer.encode("a" * 50)) == 51
    assert len(tokenizer.encode("")) == 1


def test_every_source_of_stop_tokens_counts(tmp_path):
    save_tokenizer(tmp_path)
    assert Tokenizer.load(str(tmp_path)).stop_token_ids == {1}
    write_json(tmp_path, config={"model_type": "llama", "eos_token_id": 2, "vocab_size": 300})
    assert Tokenizer.load(str(tmp_path)).stop_token_ids == {1, 2}
    write_json(tmp_path, generation_config={"eos_token_id": [2, 7]})
    assert Tokenizer.load(str(tmp_path)).stop_token_ids == {1, 2, 7}


def test_the_model_says_how_to_sample_unless_the_configuration_does_not_listen(tmp_path, caplog):
    save_tokenizer(tmp_path)
    said = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": False}
    said |= {"repetition_penalty": 1.05, "eos_token_id": 7}
    write_json(tmp_path, generation_config=said)
    with caplog.at_level("INFO", "gllm_ray.model.generation_config"):
        tokenizer = Tokenizer.for_model(ModelConfig(path=str(tmp_path)))
    assert tokenizer.sampling_defaults == SamplingDefaults(
        temperature=0.6, top_k=20, repetition_penalty=1.05
    )
    assert "temperature=0.6 top_p=1.0 top_k=20 min_p=0.0 repetition_penalty=1.05" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}
    config = ModelConfig(path=str(tmp_path), generation_config="none")
    deaf = Tokenizer.for_model(config)
    assert deaf.sampling_defaults == SamplingDefaults()
    assert deaf.stop_token_ids == tokenizer.stop_token_ids == {1, 7}


@pytest.mark.parametrize("content", [b"{broken", b"[1]", b"\xff"])
def test_a_generation_config_that_is_no_json_object_is_refused(tmp_path, content):
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json'.* JSON"):
        Tokenizer.load(str(tmp_path))


def test_a_way_to_sample_that_does_not_exist_is_refused_with_what_to_change(tmp_path):
    save_tokenizer(tmp_path)
    for name, value in {"top_p": 1.5, "repetition_penalty": 0.0}.items():
        write_json(tmp_path, generation_config={name: value})
        with pytest.raises(ConfigError, match=rf"{name}={value}: must be .*config: none"):
            Tokenizer.load(str(tmp_path))


def test_a_composed_models_text_part_counts(tmp_path):
    save_tokenizer(tmp_path)
    text_config = {"model_type": "llama", "vocab_size": 77, "eos_token_id": 9}
    write_json(tmp_path, config={"model_type": "llava", "text_config": text_config})
    tokenizer = Tokenizer.load(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.stop_token_ids) == (77, {1, 9})


def test_a_tokenizer_may_lie_apart_from_its_model(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tmp_path / "tokenizer")
    write_json(tmp_path, config={"model_type": "llama", "eos_token_id": 5, "vocab_size": 512})
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer"), model_directory=tmp_path)
    assert (tokenizer.vocab_size, tokenizer.stop_token_ids) == (512, {1, 5})


def test_without_a_config_the_vocabulary_is_the_tokenizers(tmp_path):
    tokenizer = Tokenizer.load(str(save_tokenizer(tmp_path)))
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path))


def test_no_token_has_more_characters_than_it_says(demo, demo_of_transformers):
    texts = [demo_of_transformers.decode([token_id]) for token_id in range(demo.vocab_size)]
    assert max(map(len, texts)) <= demo.max_token_chars < 100


def test_a_model_without_a_chat_template_says_so(tmp_path):
    tokenizer = Tokenizer.load(str(save_tokenizer(tmp_path)))
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template(CHAT)
    assert caught.value.param == "messages"


def test_a_template_that_refuses_the_messages_tells_the_client_why(demo):
    with pytest.raises(InvalidRequestError, match="must be system, user or assistant") as caught:
        demo.apply_chat_template([{"role": "tool", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_template_cannot_reach_python(tmp_path):
    save_tokenizer(tmp_path, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidRequestError, match="unsafe"):
        Tokenizer.load(str(tmp_path)).apply_chat_template(CHAT)


@pytest.mark.parametrize("template", ["ok\n{% if %}", "ok\n{{ messages | no_such_filter }}"])
def test_a_broken_chat_template_is_the_operators_mistake(tmp_path, template):
    save_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=r"chat template at .* has a mistake in line 2: "):
        Tokenizer.load(str(tmp_path))


def test_a_chat_template_may_refuse_what_it_is_tried_with(tmp_path):
    template = "{% if messages | length < 2 %}{{ raise_exception('two at least') }}{% endif %}a"
    save_tokenizer(tmp_path, chat_template=template)
    assert len(Tokenizer.load(str(tmp_path)).apply_chat_template(CHAT)) == 1


@pytest.mark.parametrize("files", [{}, {"config": {"model_type": "llama"}}])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path, files):
    write_json(tmp_path, **files)
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_code_that_came_with_a_model_is_never_run(tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass Trap: pass\n")
    auto_map = {"AutoTokenizer": ["trap.Trap", "trap.Trap"], "AutoConfig": "trap.Trap"}
    write_json(
        tmp_path,
        config={"model_type": "trap", "auto_map": auto_map},
        tokenizer_config={"tokenizer_class": "Trap", "auto_map": auto_map},
    )
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.load(str(tmp_path))
    assert not trap.exists()


def test_threads_may_share_it(demo):
    texts = [f"def f{index}(x): return {index} * x  # {'pad ' * index}" for index in range(50)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(demo.encode, texts)) == [demo.encode(text) for text in texts]


@pytest.fixture
def no_switches():
    """Another thread goes on only where this one lets it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("is_chat", [False, True])
def test_other_threads_go_on_while_a_long_text_is_encoded(demo, no_switches, is_chat):
    text = "a b " * 2**15
    gate, has_gone_on = threading.Lock(), threading.Event()

    def other():
        with gate:
            has_gone_on.set()

    with gate:
        thread = threading.Thread(target=other)
        thread.start()
    if is_chat:
        demo.apply_chat_template([{"role": "user", "content": text}])
    else:
        demo.encode(text)
    assert has_gone_on.is_set()
    thread.join()
