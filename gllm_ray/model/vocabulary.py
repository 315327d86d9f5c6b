"""What each token of a vocabulary stands for by itself."""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import cache

from tokenizers import Tokenizer, decoders

# How tokenizers that know characters spell a byte, and a space.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_BEGIN = "\u2581"


class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        backend: Has them.
        special_ids: Those that stand for no text.

    Attributes:
        is_byte_level: The text of tokens is their bytes, one token's after the other's.
    """

    def __init__(self, backend: Tokenizer, special_ids: AbstractSet[int]) -> None:
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._backend = backend
        self._special_ids = special_ids
        self._text_bytes: dict[int, bytes] = {}

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells tokens; empty for an id without one."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, possibly part of a character.

        A special token stands for its name, and an id without a token for nothing.
        """
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self.is_byte_level:
            return _bytes_of(token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(_WORD_BEGIN, " ").encode()

    def text_bytes(self, token_id: int) -> bytes:
        """A token's part of the text of an output, which special tokens have none in.

        Only for vocabularies of the byte level.
        """
        known = self._text_bytes.get(token_id)
        if known is None:
            is_special = token_id in self._special_ids
            known = self._text_bytes[token_id] = b"" if is_special else self.token_bytes(token_id)
        return known


def _bytes_of(token: str) -> bytes:
    """What a byte-level decoder makes of a token; an added one may be spelled as plain text."""
    byte_of_char = _byte_of_char()
    if all(char in byte_of_char for char in token):
        return bytes(byte_of_char[char] for char in token)
    return token.encode()


@cache
def _byte_of_char() -> dict[str, int]:
    # It imports torch, which is for those who load a tokenizer to wait for.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}
