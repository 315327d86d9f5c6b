"""The output of a response of the Responses API: items that grow, and the events that tell of it.

Text is of messages, and a tool call is an item of its own; they follow each other as the model
said them. The last item alone is open.
"""

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from gllm_ray.messages import FinishReason
from gllm_ray.serving.logprobs import chat_logprobs
from gllm_ray.serving.text_stream import TextDelta
from gllm_ray.serving.tool_parsers import CallDelta


class Event(NamedTuple):
    """What happened to a response.

    Attributes:
        type: As OpenAI names it, without `response.` before it.
        fields: What it tells.
    """

    type: str
    fields: dict[str, Any]


class _Message:
    """A message with one text."""

    def __init__(self, output_index: int) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._index = {"output_index": output_index}
        self._place = {"item_id": self._id, **self._index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        return [
            Event("output_item.added", {**self._index, "item": self._spell("in_progress", [])}),
            Event("content_part.added", {**self._place, "part": self._part()}),
        ]

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return Event("output_text.delta", {**self._place, "delta": text, "logprobs": logprobs})

    def end(self, status: str) -> list[Event]:
        part = self._part()
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            Event("output_text.done", {**self._place, **text}),
            Event("content_part.done", {**self._place, "part": part}),
            Event("output_item.done", {**self._index, "item": self.item(status)}),
        ]

    def item(self, status: str) -> dict[str, Any]:
        return self._spell(status, [self._part()])

    def _spell(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "status": status}
        return {**head, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        part = {"type": "output_text", "text": text, "annotations": []}
        return {**part, "logprobs": list(self._logprobs)}


class _Call:
    """A call of a function."""

    def __init__(self, output_index: int, name: str) -> None:
        self._id = f"fc_{uuid.uuid4().hex}"
        self._call_id = f"call_{uuid.uuid4().hex}"
        self._name = name
        self._index = {"output_index": output_index}
        self._place = {"item_id": self._id, **self._index}
        self._arguments: list[str] = []

    def begin(self) -> list[Event]:
        return [Event("output_item.added", {**self._index, "item": self.item("in_progress")})]

    def grow(self, arguments: str) -> Event:
        self._arguments.append(arguments)
        return Event("function_call_arguments.delta", {**self._place, "delta": arguments})

    def end(self, status: str) -> list[Event]:
        item = self.item(status)
        said = {"name": self._name, "arguments": item["arguments"]}
        return [
            Event("function_call_arguments.done", {**self._place, **said}),
            Event("output_item.done", {**self._index, "item": item}),
        ]

    def item(self, status: str) -> dict[str, Any]:
        head = {"id": self._id, "type": "function_call", "status": status}
        said = {"name": self._name, "arguments": "".join(self._arguments)}
        return {**head, "call_id": self._call_id, **said}


class OutputItems:
    """The items of one output.

    Args:
        token_bytes: What a token of the model stands for.

    Attributes:
        finish_reason: Of the output, once it has ended.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.finish_reason: FinishReason | str | None = None
        self._token_bytes = token_bytes
        self._done: list[dict[str, Any]] = []
        self._open: _Message | _Call | None = None

    def grow(self, delta: TextDelta) -> list[Event]:
        """What happens by a delta."""
        events: list[Event] = []
        if delta.text or delta.scored:
            events += self._grow_text(delta)
        for call in delta.calls:
            events += self._grow_call(call)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            if self._open is None:  # an answer has an item, though it says nothing
                events += self._begin(_Message(0))
            is_cut = delta.finish_reason is FinishReason.LENGTH
            events += self._end("incomplete" if is_cut else "completed")
        return events

    def spell(self) -> list[dict[str, Any]]:
        """The items so far."""
        return self._done + ([self._open.item("incomplete")] if self._open else [])

    def _grow_text(self, delta: TextDelta) -> list[Event]:
        events = []
        if not isinstance(self._open, _Message):
            events = self._begin(_Message(self._next_index))
        scored = delta.scored
        logprobs = chat_logprobs(scored, self._token_bytes)["content"] if scored else []
        return [*events, self._open.grow(delta.text, logprobs)]

    def _grow_call(self, call: CallDelta) -> list[Event]:
        events = []
        if call.name is not None:
            events = self._begin(_Call(self._next_index, call.name))
        return [*events, self._open.grow(call.arguments)] if call.arguments else events

    @property
    def _next_index(self) -> int:
        return len(self._done) + (self._open is not None)

    def _begin(self, item: _Message | _Call) -> list[Event]:
        events = self._end("completed")
        self._open = item
        return events + item.begin()

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self._done.append(self._open.item(status))
        self._open = None
        return events
