"""The text handed over is the tokenizer's own, whatever the tokens, and never taken back."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gllm_ray.model.detokenizer import StopMatcher, StopRule, WindowDecoder
from gllm_ray.model.tokenizer import Tokenizer as ServedTokenizer

# Words that share beginnings and ends, and characters of 2, 3 and 4 bytes.
WORDS = ["ab", "abc", "b", "a", " a", "bca", "€", "ß", "€€", "😀", "\n"]


def byte_level_backend():
    """All bytes, words, pieces of characters, a special token and added ones."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in WORDS:
        spelled = split.pre_tokenize_str(word)[0][0]
        tokens += [spelled, spelled[1:], spelled[:-1], spelled[-1] + spelled[0]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(filter(None, tokens)))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("<fill me>", special=False), AddedToken("€_", special=False)])
    return backend


def byte_fallback_backend():
    """As of Llama 2: words that begin with a space, and a token for each byte."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁▁", *(word.replace(" ", "▁") for word in WORDS), "▁ab"]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<|end|>"])
    return backend


BYTE_LEVEL = ServedTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level_backend()))
BYTE_FALLBACK = ServedTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_fallback_backend()))
BYTE_FALLBACK_TEXT = range(257, BYTE_FALLBACK.vocab_size)


def plain_decode(tokenizer, ids, *, skips_special=True):
    return tokenizer._backend.decode(list(ids), skip_special_tokens=skips_special)


def detokenize(
    tokenizer, ids, stop_strings=(), prompt_ids=(), shown_tokens=(), skips_special=True, **rule
):
    """The pieces handed over for each token, and at the end."""
    detokenizer = tokenizer.new_detokenizer(
        prompt_ids, StopRule(stop_strings, **rule), shown_tokens, skips_special=skips_special
    )
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.step(token_id))
        if detokenizer.matched is not None:
            return pieces
    return [*pieces, detokenizer.flush()]


def cut(text, stop_strings, num_before=0, *, is_included=False):
    """`text` up to the stop string that is complete first, the longest of several.

    It has more than `num_before` characters up to the end of the stop string.
    """
    for end in range(num_before + 1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            return text[: end if is_included else end - max(map(len, found))]
    return text


def num_held_back(text, stop_strings):
    """Characters at the end of `text` that may begin a stop string."""
    beginnings = {stop[:length] for stop in stop_strings for length in range(len(stop))}
    return max(
        (length for length in range(len(text) + 1) if text[len(text) - length :] in beginnings),
        default=0,
    )


byte_level_ids = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 2), max_size=40)
stops = st.lists(
    st.one_of(
        st.text("abc €😀", min_size=1, max_size=5),
        st.sampled_from(["\ufffd", "abcabcab", "aab", "€a", "<fill me>"]),
    ),
    max_size=4,
)


def utf8_ids(text):
    """A text as byte-fallback tokens."""
    return [1 + byte for byte in text.encode()]


# Sequences that are valid UTF-8 once whole: words, and characters cut into bytes.
byte_fallback_ids = st.lists(
    st.one_of(
        st.sampled_from(BYTE_FALLBACK_TEXT).map(lambda token_id: [token_id]),
        st.text(min_size=1, max_size=3).map(utf8_ids),
    ),
    max_size=12,
).map(lambda runs: [token_id for run in runs for token_id in run])


@settings(deadline=None)
@given(byte_level_ids, stops)
def test_byte_level_text_is_the_tokenizers_up_to_the_first_stop(ids, stop_strings):
    pieces = detokenize(BYTE_LEVEL, ids, stop_strings)
    assert "".join(pieces) == cut(plain_decode(BYTE_LEVEL, ids), stop_strings)


@settings(deadline=None)
@given(
    st.text("ab€", max_size=20).map(BYTE_LEVEL.encode) | byte_level_ids,
    st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3) | stops,
    st.integers(0, 20),
    st.booleans(),
)
@example(BYTE_LEVEL.encode("bab€"), ["ab", "baba"], 3, False)
@example(BYTE_LEVEL.encode("abab"), ["ab"], 2, True)
def test_a_stop_counts_after_the_least_tokens_and_is_shown_where_that_is_asked_for(
    ids, stop_strings, min_tokens, is_included
):
    rule = {"min_tokens": min_tokens, "is_included": is_included}
    pieces = detokenize(BYTE_LEVEL, ids, stop_strings, **rule)
    whole = detokenize(BYTE_LEVEL, ids)
    num_before = len("".join(whole[:min_tokens] if min_tokens < len(ids) else whole))
    expected = cut("".join(whole), stop_strings, num_before, is_included=is_included)
    assert "".join(pieces) == expected


@settings(deadline=None)
@given(byte_fallback_ids, byte_fallback_ids, stops)
@example([], [258], [])
@example([], [1 + 0x20] * 30, [])
def test_byte_fallback_text_is_the_tokenizers_up_to_the_first_stop(prompt, ids, stop_strings):
    whole, before = (plain_decode(BYTE_FALLBACK, part) for part in (prompt + ids, prompt))
    pieces = detokenize(BYTE_FALLBACK, ids, stop_strings, prompt)
    assert "".join(pieces) == cut(whole.removeprefix(before), stop_strings)


def word_or_its_bytes(word):
    whole = BYTE_LEVEL._backend.pre_tokenizer.pre_tokenize_str(word)[0][0]
    return [[BYTE_LEVEL._backend.token_to_id(whole)], BYTE_LEVEL._backend.encode(word).ids]


@settings(deadline=None)
@given(st.lists(st.sampled_from([ids for word in WORDS for ids in word_or_its_bytes(word)])), stops)
def test_only_an_unfinished_character_or_stop_string_is_held_back(spelled_words, stop_strings):
    ids = [token_id for word in spelled_words for token_id in word]
    pieces = detokenize(BYTE_LEVEL, ids, stop_strings)
    for num_tokens in range(len(pieces)):
        so_far = plain_decode(BYTE_LEVEL, ids[:num_tokens]).removesuffix("\ufffd")
        final = so_far[: len(so_far) - num_held_back(so_far, stop_strings)]
        assert "".join(pieces[:num_tokens]) == final


@settings(deadline=None)
@given(st.lists(st.sampled_from(range(BYTE_FALLBACK.vocab_size + 2)), max_size=60))
@example([1 + 0x80] * 50)
@example([*utf8_ids("€"), 1 + 0xFF])
@example([BYTE_FALLBACK.vocab_size - 1] * 50)
def test_a_window_stays_short_and_survives_invalid_utf8(ids):
    lengths = []

    def decode(window):
        lengths.append(len(window))
        return plain_decode(BYTE_FALLBACK, window)

    decoder = WindowDecoder(decode)
    pieces = [decoder.step(token_id) for token_id in ids] + [decoder.flush()]
    assert max(lengths) <= 16
    if "\ufffd" not in plain_decode(BYTE_FALLBACK, ids):
        assert "".join(pieces) == plain_decode(BYTE_FALLBACK, ids)


def test_the_first_word_after_a_prompt_keeps_its_space():
    prompt, word = [257 + 2], BYTE_FALLBACK._backend.token_to_id("▁ab")
    assert "".join(detokenize(BYTE_FALLBACK, [word], (), prompt)) == " ab"
    assert "".join(detokenize(BYTE_FALLBACK, [word])) == "ab"


def test_the_offsets_of_words_that_begin_with_a_space_are_those_of_the_text():
    ids = [BYTE_FALLBACK._backend.token_to_id(token) for token in ("▁ab", "▁ab", "<0x41>", "▁ab")]
    assert BYTE_FALLBACK.decode(ids) == "ab abA ab"
    assert BYTE_FALLBACK.text_offsets(ids, "ab abA ab") == [0, 2, 5, 6]
    # A text that its tokenizer spells in another way is the limit.
    assert BYTE_FALLBACK.text_offsets(ids, "ab") == [0, 2, 2, 2]


@settings(deadline=None)
@given(byte_level_ids, stops | st.just(["<|end|>"]) | st.just(["d|><|"]))
def test_byte_level_text_may_have_the_names_of_special_tokens(ids, stop_strings):
    pieces = detokenize(BYTE_LEVEL, ids, stop_strings, skips_special=False)
    whole = plain_decode(BYTE_LEVEL, ids, skips_special=False)
    assert "".join(pieces) == cut(whole, stop_strings)


@settings(deadline=None)
@given(byte_fallback_ids, byte_fallback_ids, stops | st.just(["<|end|>"]))
def test_byte_fallback_text_may_have_the_names_of_special_tokens(prompt, ids, stop_strings):
    whole, before = (
        plain_decode(BYTE_FALLBACK, part, skips_special=False) for part in (prompt + ids, prompt)
    )
    pieces = detokenize(BYTE_FALLBACK, ids, stop_strings, prompt, skips_special=False)
    assert "".join(pieces) == cut(whole.removeprefix(before), stop_strings)


def test_special_tokens_have_no_text_wherever_they_stand():
    for tokenizer, euro in ((BYTE_LEVEL, BYTE_LEVEL.encode("€")), (BYTE_FALLBACK, utf8_ids("€"))):
        end = tokenizer._backend.token_to_id("<|end|>")
        assert "".join(detokenize(tokenizer, [end, euro[0], end, *euro[1:], end])) == "€"


def test_an_output_that_ends_within_a_character_says_so():
    first_byte = BYTE_LEVEL._backend.encode("😀").ids[0]
    assert detokenize(BYTE_LEVEL, [first_byte]) == ["", "\ufffd"]


def test_a_prompt_cut_within_a_character_does_not_spoil_the_text_after_it():
    prompt = utf8_ids("语言模型")  # 12 tokens, so that no context of 8 begins at a character.
    assert "".join(detokenize(BYTE_FALLBACK, utf8_ids("很好"), (), prompt)) == "很好"


@pytest.mark.parametrize(
    ("pieces", "stop_strings", "emitted"),
    [
        (["a", "b", "c", "d"], ["bc"], ["a", "", ""]),
        (["a", "b", "x"], ["bc"], ["a", "", "bx"]),
        (["aab", "aac"], ["aabaac"], ["", ""]),
        (["aabaabaac"], ["aabaac"], ["aab"]),
        (["xabcd"], ["abcd", "bc"], ["xa"]),
        (["x", "a", "b", "c"], ["abcd", "bc"], ["x", "", "", "a"]),
        (["xabc"], ["abc", "bc", "c"], ["x"]),
        (["ab"], [], ["ab"]),
    ],
)
def test_a_stop_string_is_found_across_pieces_and_never_shown(pieces, stop_strings, emitted):
    matcher = StopMatcher(StopRule(stop_strings))
    assert [matcher.step(piece) for piece in pieces[: len(emitted)]] == emitted


def test_text_held_for_a_stop_string_is_handed_over_at_the_end():
    matcher = StopMatcher(StopRule(["stop"]))
    assert (matcher.step("do not st"), matcher.flush()) == ("do not ", "st")
    assert matcher.matched is None


@pytest.mark.parametrize("backend", [byte_level_backend(), byte_fallback_backend()])
def test_of_special_tokens_only_those_asked_for_have_a_text(backend):
    backend.add_special_tokens(["<call>", "<other>"])
    tokenizer = ServedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    word = backend.token_to_id("a")
    call, other, end = map(backend.token_to_id, ("<call>", "<other>", "<|end|>"))
    ids = [call, word, other, call, call, word, end, word, call]
    shown = detokenize(tokenizer, ids, shown_tokens=("<call>", "unknown", "a"))
    assert "".join(shown) == "<call>a<call><call>aa<call>"
    assert "".join(detokenize(tokenizer, ids)) == "aaa"
