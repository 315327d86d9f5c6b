"""Tokens in, final text out: nothing that was handed over is ever taken back.

Text is held while it may still change: the bytes of an unfinished UTF-8 sequence, and the end of
the text while it may be the beginning of a stop string.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 sequence has at most 3 bytes, so it spans at most 3 tokens with text.
_MAX_PENDING_TOKENS = 8


class TextDecoder(Protocol):
    """Decodes a sequence token by token."""

    def step(self, token_id: int) -> str:
        """Append a token; return the text that became final."""

    def flush(self) -> str:
        """Return the text of what is still pending; the sequence has ended."""


class ByteLevelDecoder:
    """For tokens that are byte strings: exact on any sequence, invalid UTF-8 included.

    Args:
        token_bytes: The bytes of a token.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        """Append a token; return the text that became final."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD if the sequence ended within a character."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other tokenizer: decodes the last few tokens again with each new one.

    The tokens of the last text that was handed over stay in the window, because a token's text may
    depend on what stands before it. Exact where the whole text is valid UTF-8. A byte-fallback
    decoder spells a whole run of bytes as U+FFFD once one of them is invalid; text of the run that
    was handed over before then stays as it was.

    Args:
        decode: The text of a list of tokens.
        context_ids: The last tokens before the first one to decode.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        # A context that begins or ends within a character would spoil the text after it.
        while context_ids and _REPLACEMENT in decode(context_ids):
            context_ids = context_ids[1:]
        self._move_window(context_ids)

    def step(self, token_id: int) -> str:
        """Append a token; return the text that became final."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_context
        if text.endswith(_REPLACEMENT) and num_pending < _MAX_PENDING_TOKENS:
            return ""
        return self._hand_over(text)

    def flush(self) -> str:
        """Return the text of the tokens still pending."""
        return self._hand_over(self._decode(self._window))

    def _hand_over(self, text: str) -> str:
        pending = self._window[self._num_context :]
        is_continued = text.startswith(self._context)
        new = text[len(self._context) :] if is_continued else self._decode(pending)
        if new:
            self._move_window(pending)
        elif len(pending) >= _MAX_PENDING_TOKENS:
            del self._window[self._num_context :]  # None of them has text.
        return new

    def _move_window(self, context_ids: Sequence[int]) -> None:
        self._window = list(context_ids)
        self._num_context = len(self._window)
        self._context = self._decode(self._window)


def find_start(text: str, stop: str, place: int = 0) -> int:
    """Where the end of `text` may begin `stop`, from `place` on; its length if nowhere."""
    start = text.find(stop[0], max(place, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


class StopRule(NamedTuple):
    """Where a text ends.

    Attributes:
        strings: Any of them ends it; none is empty.
        is_included: The text ends after the stop string or stop token, and not before it.
        min_tokens: A stop string that is complete with so many tokens or fewer does not count.
        token_ids: Tokens that are told of where they end the text.
    """

    strings: Sequence[str] = ()
    is_included: bool = False
    min_tokens: int = 0
    token_ids: Collection[int] = ()


class StopMatcher:
    """Ends a text at the stop string that is complete first, the longest of several.

    Args:
        rule: All of it but `min_tokens` and `token_ids`.

    Attributes:
        matched: The stop string that ended the text; None: none has.
    """

    def __init__(self, rule: StopRule) -> None:
        self.matched: str | None = None
        self._stop_strings = rule.strings
        self._is_included = rule.is_included
        self._held = ""

    def step(self, text: str, *, may_stop: bool = True) -> str:
        """Append text; return what can no longer be part of a stop string.

        Args:
            text: The new text.
            may_stop: Whether a stop string that is complete with it counts.
        """
        num_seen = len(self._held)
        text = self._held + text
        matches = [
            (start + len(stop), start)
            for stop in (self._stop_strings if may_stop else ())
            # One that was complete before did not count.
            if (start := text.find(stop, max(0, num_seen - len(stop) + 1))) >= 0
        ]
        if matches:
            self._held = ""
            end, start = min(matches)
            self.matched = text[start:end]
            return text[: end if self._is_included else start]
        num_final = min((find_start(text, stop) for stop in self._stop_strings), default=len(text))
        self._held = text[num_final:]
        return text[:num_final]

    def flush(self) -> str:
        """Return the text held back; no more follows."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """The text of one output, as it grows.

    Attributes:
        rule: Where it ends.
        num_chars: Characters of the tokens so far, those held back for a stop string included.
    """

    def __init__(self, decoder: TextDecoder, rule: StopRule = StopRule()) -> None:  # noqa: B008
        self.rule = rule
        self.num_chars = 0
        self._num_tokens = 0
        self._decoder = decoder
        self._matcher = StopMatcher(rule)

    @property
    def matched(self) -> str | None:
        """The stop string that is complete, with which the text has ended; None: none is."""
        return self._matcher.matched

    def step(self, token_id: int) -> str:
        """Append a token; return the text that became final. Not to be called once stopped."""
        text = self._decoder.step(token_id)
        self.num_chars += len(text)
        self._num_tokens += 1
        return self._matcher.step(text, may_stop=self._may_stop)

    def flush(self) -> str:
        """Return the text held so far; the output has ended."""
        text = self._matcher.step(self._decoder.flush(), may_stop=self._may_stop)
        return text + self._matcher.flush()

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens > self.rule.min_tokens
