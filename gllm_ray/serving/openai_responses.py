"""The responses of OpenAI's API, whole and in chunks."""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.logprobs import chat_logprobs, completion_logprobs
from gllm_ray.serving.text_stream import ScoredToken, TextDelta
from gllm_ray.serving.tool_parsers import CallDelta
from gllm_ray.serving.usage import UsageMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What every chunk of a response repeats.

    Attributes:
        id: `chatcmpl-...` or `cmpl-...`, unique.
        created: Seconds since the epoch.
        model: The model's name in the API.
        is_chat: A chat completion, else a completion.
        token_bytes: What a token of the model stands for.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    token_bytes: Callable[[int], bytes]

    @classmethod
    def new(cls, *, model: str, is_chat: bool, token_bytes: Callable[[int], bytes]) -> Self:
        """A head with an id of its own."""
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        created = int(time.time())
        return cls(id=name, created=created, model=model, is_chat=is_chat, token_bytes=token_bytes)

    def fields(self, kind: str) -> dict[str, Any]:
        """The fields before `choices`; `kind` is that of a chat response."""
        kind = kind if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """The `logprobs` of a choice; None without such tokens."""
        if not scored:
            return None
        spell = chat_logprobs if self.is_chat else completion_logprobs
        return spell(scored, self.token_bytes)


def response_body(
    head: ResponseHead,
    outputs: Sequence[TextDelta],
    meter: UsageMeter,
    prompts: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """The body of a response that is not streamed.

    Args:
        head: What it begins with.
        outputs: All of each.
        meter: Counts them.
        prompts: The tokens that each continues, where token ids are asked for; else none.
    """
    choices = [
        {
            "index": output.index,
            **({"message": _message(output)} if head.is_chat else {"text": output.text}),
            "logprobs": head.logprobs(output.scored),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        for output in outputs
    ]
    for output in outputs:
        meter.add(output)
    body = {**head.fields("chat.completion"), "choices": choices, "usage": meter.usage()}
    if prompts:
        for choice, output, prompt in zip(choices, outputs, prompts, strict=True):
            choice["token_ids"] = output.token_ids
            (body if head.is_chat else choice)["prompt_token_ids"] = prompt
    return body


def _message(output: TextDelta) -> dict[str, Any]:
    message = {"role": "assistant", "content": output.text, "refusal": None}
    if not output.calls:
        return message
    calls = [_begin_call(call) for call in output.calls]
    return {**message, "content": output.text or None, "tool_calls": calls}


def _begin_call(call: CallDelta) -> dict[str, Any]:
    """A call, or its beginning, with an id of its own."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class ChunkWriter:
    """Spells a streamed response as server-sent events.

    The JSON around a text is spelled once, because a chunk is written for every few tokens.

    Args:
        head: What every chunk repeats.
        meter: Counts what is written.
        include_usage: Chunks carry `usage`, which is null but in the last.
        is_usage_continuous: It is that of all outputs so far.
        prompts: As for `response_body`.
    """

    def __init__(
        self,
        head: ResponseHead,
        meter: UsageMeter,
        *,
        include_usage: bool = False,
        is_usage_continuous: bool = False,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self._is_chat = head.is_chat
        self._logprobs = head.logprobs
        self._meter = meter
        self._include_usage = include_usage
        self._is_usage_continuous = include_usage and is_usage_continuous
        self._prompts = prompts
        self._head = _dumps(head.fields("chat.completion.chunk"))[:-1]
        self._tail = '],"usage":null}' if include_usage else "]}"
        self._begun: set[int] = set()
        self._num_calls: Counter[int] = Counter()  # of each output

    def write(self, delta: TextDelta) -> str:
        """The events for a delta: role, new text, tokens or calls, how it ended, as there are."""
        events, prompt = "", ""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            prompt = self._spell_prompt(delta.index)
            if self._is_chat:
                role = '"delta":{"role":"assistant","content":""}' + self._spell_tokens(())
                events += self._chunk(delta.index, role, outside=prompt)
                prompt = ""
        self._meter.add(delta)
        if delta.text or delta.scored or delta.calls or (self._prompts and delta.token_ids):
            text = _dumps(delta.text)
            content = f'"delta":{{"content":{text}}}' if self._is_chat else f'"text":{text}'
            if delta.calls:
                content = f'"delta":{{"tool_calls":{_dumps(self._spell_calls(delta))}}}'
            content += self._spell_tokens(delta.token_ids) + prompt
            logprobs = _dumps(self._logprobs(delta.scored)) if delta.scored else "null"
            events += self._chunk(delta.index, content, logprobs=logprobs)
        if delta.finish_reason is not None:
            content = '"delta":{}' if self._is_chat else '"text":""'
            content += self._spell_tokens(())
            reasons = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            events += self._chunk(delta.index, content, reasons=_dumps(reasons)[1:-1])
        return events

    def _spell_prompt(self, index: int) -> str:
        """One more field, where token ids are asked for; so is the next."""
        return f',"prompt_token_ids":{_dumps(self._prompts[index])}' if self._prompts else ""

    def _spell_tokens(self, token_ids: Sequence[int]) -> str:
        return f',"token_ids":{_dumps(token_ids)}' if self._prompts else ""

    def _spell_calls(self, delta: TextDelta) -> list[dict[str, Any]]:
        spelled = []
        for call in delta.calls:
            grown: dict[str, Any] = {"function": {"arguments": call.arguments}}
            if call.name is not None:
                self._num_calls[delta.index] += 1
                grown = _begin_call(call)
            spelled.append({"index": self._num_calls[delta.index] - 1, **grown})
        return spelled

    def write_end(self) -> str:
        """The events after the last delta."""
        done = _event("[DONE]")
        if not self._include_usage:
            return done
        return _event(f'{self._head},"choices":[{self._usage_tail()}') + done

    def write_error(self, error: HttpError) -> str:
        """The event after which nothing comes."""
        return _event(error.body())

    def _usage_tail(self) -> str:
        return f'],"usage":{_dumps(self._meter.usage())}}}'

    def _chunk(
        self,
        index: int,
        content: str,
        *,
        logprobs: str = "null",
        reasons: str = '"finish_reason":null',
        outside: str = "",
    ) -> str:
        ends = f'"logprobs":{logprobs},{reasons}}}'
        tail = self._usage_tail() if self._is_usage_continuous else self._tail
        choice = f'{{"index":{index},{content},{ends}'
        return _event(f'{self._head}{outside},"choices":[{choice}{tail}')


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
