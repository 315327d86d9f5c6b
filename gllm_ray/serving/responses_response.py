"""The response of the Responses API, whole and as a stream of events."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import FinishReason, GenerationRequest
from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.responses_output import Event, OutputItems
from gllm_ray.serving.responses_request import ResponsesRequest
from gllm_ray.serving.services import GenerationService
from gllm_ray.serving.text_stream import TextDelta
from gllm_ray.serving.usage import UsageMeter

# OpenAI's words for what ends a response early, by the status that it would have had before.
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
# Of what is not there.
_NEUTRAL = {
    "background": False,
    "max_tool_calls": None,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "truncation": "disabled",
}


def new_response_id() -> str:
    """An id that no other response has."""
    return f"resp_{uuid.uuid4().hex}"


class GrowingResponse:
    """A response, in whatever state.

    Args:
        body: What it repeats.
        response_id: Its id.
        service: Of the model.
        requests: That of its output.

    Raises:
        InvalidRequestError: JSON cannot repeat the body.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        response_id: str,
        service: GenerationService,
        requests: Sequence[GenerationRequest],
    ) -> None:
        said = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
            **_repeated(body),
            "temperature": requests[0].sampling.temperature,
            "top_p": requests[0].sampling.top_p,
            **_NEUTRAL,
        }
        try:
            self._head = _dumps(said)[:-1]
        except ValueError as error:
            raise InvalidRequestError(
                f"the body has a number that JSON does not know: {error}"
            ) from error
        self._output = OutputItems(service.tokenizer.vocabulary.token_bytes)
        self._meter = UsageMeter(requests, 1)

    def grow(self, delta: TextDelta) -> list[Event]:
        """Add a delta; what happens by it."""
        self._meter.add(delta)
        return self._output.grow(delta)

    @property
    def status(self) -> str:
        """As OpenAI names it, unless the response failed."""
        reason = self._output.finish_reason
        if reason is None:
            return "in_progress"
        return "incomplete" if reason is FinishReason.LENGTH else "completed"

    def to_json(self, error: HttpError | None = None) -> str:
        """The state that the response is in; with an error, it failed."""
        status = "failed" if error else self.status
        is_over = status in ("completed", "incomplete")
        state = {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error and _spell_error(error),
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": self._output.spell(),
            "usage": self._usage() if is_over else None,
        }
        return f"{self._head},{_dumps(state)[1:]}"

    def _usage(self) -> dict[str, Any]:
        usage = self._meter.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


class ResponseEventWriter:
    """Spells a response as server-sent events, each with a number.

    Args:
        response: Of which nothing has come yet.
    """

    def __init__(self, response: GrowingResponse) -> None:
        self._response = response
        self._num_events = 0

    def write(self, delta: TextDelta) -> str:
        """The events for a delta; before the first ones, the response is there."""
        begin = self._begin()
        return begin + "".join(
            self._event(kind, _dumps(fields)[1:]) for kind, fields in self._response.grow(delta)
        )

    def write_end(self) -> str:
        """The event of the end."""
        return self._state(self._response.status)

    def write_error(self, error: HttpError) -> str:
        """The event of the failure, which may be the first."""
        return self._begin() + self._state("failed", error)

    def _begin(self) -> str:
        return "" if self._num_events else self._state("created") + self._state("in_progress")

    def _state(self, kind: str, error: HttpError | None = None) -> str:
        return self._event(kind, f'"response":{self._response.to_json(error)}}}')

    def _event(self, kind: str, fields: str) -> str:
        """An event with the rest of its JSON object."""
        number = self._num_events
        self._num_events += 1
        head = f'{{"type":"response.{kind}","sequence_number":{number}'
        return f"event: response.{kind}\ndata: {head},{fields}\n\n"


def _repeated(body: ResponsesRequest) -> dict[str, Any]:
    """What a response tells of its request."""
    text_format = body.text and body.text.format
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "max_output_tokens": body.max_output_tokens,
        "frequency_penalty": body.frequency_penalty or 0,
        "presence_penalty": body.presence_penalty or 0,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "text": {"format": text_format.said if text_format else {"type": "text"}},
        "tool_choice": choice.said if choice else "auto",
        "tools": [{"type": tool.type, **tool.definition} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "user": body.user,
    }


def _spell_error(error: HttpError) -> dict[str, Any]:
    return {**error.fields(), "code": _ERROR_CODES.get(error.status, "server_error")}


def _dumps(value: object) -> str:
    # ASCII, because a client's text may hold what UTF-8 cannot encode.
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
