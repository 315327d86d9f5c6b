"""From the text of an output, piece by piece, to its content and the tool calls in it.

What a parser makes of a text is the same however the text is cut. Text is held back only while it
may belong to a call; what turns out to be none is content, as it was written. Around calls, only
markers, separators and white space have no part in either.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from gllm_ray.model.detokenizer import find_start

_WHITE = " \t\r\n"
_GAP = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class CallDelta(NamedTuple):
    """How far a tool call grew.

    Attributes:
        name: The function's, where a call begins; None: it goes on.
        arguments: What its arguments grew by, in JSON.
    """

    name: str | None
    arguments: str


def merge_calls(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """Each call as one delta."""
    grown: list[tuple[str, list[str]]] = []
    for name, arguments in deltas:
        if name is not None:
            grown.append((name, []))
        grown[-1][1].append(arguments)
    return [CallDelta(name, "".join(pieces)) for name, pieces in grown]


class ToolParser(Protocol):
    """Parses one output.

    Attributes:
        markers: What stands around calls; a tokenizer may have tokens for it that are no text.
    """

    markers: Sequence[str]

    def step(self, text: str) -> list[str | CallDelta]:
        """Append text; return the content and the calls that became final, in their order."""

    def flush(self) -> list[str | CallDelta]:
        """Return what was held back; the output has ended."""


class HermesParser:
    """For `<tool_call>` around JSON, once or more often, before, between or after content."""

    markers = ("<tool_call>", "</tool_call>")

    def __init__(self) -> None:
        self._begin, self._end = self.markers
        self._is_after_call = False
        self._call: list[str] | None = None  # the text since its marker, in pieces
        self._held = ""  # may be the beginning of the marker that comes next

    def step(self, text: str) -> list[str | CallDelta]:
        """See `ToolParser.step`."""
        text = self._held + text
        pieces: list[str | CallDelta] = []
        place = 0
        while (at := text.find(self._begin if self._call is None else self._end, place)) >= 0:
            self._add(pieces, text[place:at])
            if self._call is None:
                self._call, place = [], at + len(self._begin)
            else:
                pieces.append(self._close(self._end))
                place = at + len(self._end)
        num_final = find_start(text, self._begin if self._call is None else self._end, place)
        self._add(pieces, text[place:num_final])
        self._held = text[num_final:]
        return pieces

    def flush(self) -> list[str | CallDelta]:
        """See `ToolParser.flush`; a call may lack its last marker."""
        held, self._held = self._held, ""
        if self._call is None:
            return [held] if held else []
        return [self._close(held)]

    def _add(self, pieces: list[str | CallDelta], text: str) -> None:
        if self._call is not None:
            self._call.append(text)
            return
        if self._is_after_call:
            text = text.lstrip(_WHITE)
        if text:
            self._is_after_call = False
            pieces.append(text)

    def _close(self, end: str) -> str | CallDelta:
        """The call that ends, or its text with both its ends."""
        text = "".join(self._call or ())
        self._call = None
        call = parse_call(text)
        self._is_after_call = call is not None
        return call or f"{self._begin}{text}{end}"


class JsonCallsParser:
    """For outputs of nothing but JSON objects, each a call; from any other text on, all is content.

    Args:
        separators: What may stand around the objects, beside white space.
        marker: What may stand before the first, too; empty: nothing.
    """

    def __init__(self, separators: str, marker: str = "") -> None:
        self.markers = (marker,) if marker else ()
        self._ignored = _WHITE + separators
        self._marker = self._rest_of_marker = marker
        self._has_calls = False
        self._has_other_text = False
        self._held: list[str] = []  # since the last call, up to an object
        self._object: list[str] = []
        self._scanner = _ObjectScanner()

    def step(self, text: str) -> list[str | CallDelta]:
        """See `ToolParser.step`."""
        pieces: list[str | CallDelta] = []
        place = 0
        while place < len(text):
            if self._has_other_text:
                pieces.append(text[place:])
                return pieces
            if self._object or (text[place] == "{" and not self._is_in_marker):
                end = self._scanner.find_end(text, place)
                self._object.append(text[place:end])
                if end is None:
                    return pieces
                pieces.append(self._close())
                place = end
            else:
                self._held.append(text[place])
                place += 1
                if not self._may_precede(text[place - 1]):
                    pieces.append(self._give_up())
        return pieces

    def flush(self) -> list[str | CallDelta]:
        """See `ToolParser.flush`."""
        is_content = self._object or (self._held and not self._has_calls)
        return [self._give_up()] if is_content else []

    @property
    def _is_in_marker(self) -> bool:
        return 0 < len(self._rest_of_marker) < len(self._marker)

    def _may_precede(self, char: str) -> bool:
        """Whether a character may stand before an object, after those that did."""
        if self._rest_of_marker.startswith(char):
            self._rest_of_marker = self._rest_of_marker[1:]
            return True
        return char in self._ignored and not self._is_in_marker

    def _close(self) -> str | CallDelta:
        call = parse_call("".join(self._object))
        if call is None:
            return self._give_up()
        self._has_calls = True
        self._rest_of_marker = ""
        self._held, self._object = [], []
        return call

    def _give_up(self) -> str:
        """What was held back, which is content, as all that follows."""
        self._has_other_text = True
        text = "".join(self._held + self._object)
        self._held, self._object = [], []
        return text


class NamedCallParser:
    """For outputs that are the arguments of a call, and nothing else.

    Args:
        name: Of the function.
    """

    markers = ()

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def step(self, text: str) -> list[str | CallDelta]:
        """See `ToolParser.step`."""
        if not text:
            return []
        name, self._name = self._name, None
        return [CallDelta(name, text)]

    def flush(self) -> list[str | CallDelta]:
        """See `ToolParser.flush`."""
        return []


class _ObjectScanner:
    """Finds where a JSON object ends, in a text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def find_end(self, text: str, place: int) -> int | None:
        """Go on at a place; return the one after the object, if the text has it."""
        for at in range(place, len(text)):
            char = text[at]
            if self._is_escaped:
                self._is_escaped = False
            elif char == '"':
                self._is_in_string = not self._is_in_string
            elif self._is_in_string:
                self._is_escaped = char == "\\"
            elif char == "{":
                self._depth += 1
            elif char == "}":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None


def parse_call(text: str) -> CallDelta | None:
    """The call that a JSON object with `name` and `arguments`, or `parameters`, is.

    None if it is something else, or has arguments that are no object.
    """
    try:
        call = json.loads(text, parse_constant=_refuse)
        key = "arguments" if "arguments" in call else "parameters"
        if not (isinstance(call["name"], str) and isinstance(call[key], dict)):
            return None
        call["name"].encode()  # JSON can spell half of a surrogate pair, which is no character
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return CallDelta(call["name"], _spelling(text, key))


def _spelling(text: str, key: str) -> str:
    """How a member of a JSON object is spelled in its text; of several the last, as they count."""
    spelling, place = "", 0
    while (place := text.find('"', place)) >= 0:
        name, place = _DECODER.raw_decode(text, place)
        place = _GAP.match(text, text.index(":", place) + 1).end()
        _, end = _DECODER.raw_decode(text, place)
        if name == key:
            spelling = text[place:end]
        place = end
    return spelling


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
