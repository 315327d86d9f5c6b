"""A row of a batch, and what comes of it, as OpenAI's batch files spell them."""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.request_schema import check_text, parse_schema

URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One request.

    Attributes:
        number: Its line in a JSONL file, or its row in a table; from 1.
        custom_id: Unique in the file.
        url: The route it is for.
        body: What that route takes.
    """

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """Why a row cannot be run.

    Attributes:
        number: As for `BatchRow`.
        message: What is wrong with it.
    """

    number: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the route says.

    Attributes:
        status: Of HTTP.
        body: The response's, or in the shape of OpenAI's errors.
    """

    status: int
    body: Mapping[str, Any]

    @property
    def is_success(self) -> bool:
        """Whether there is an output."""
        return self.status == 200 and "choices" in self.body

    @classmethod
    def of_error(cls, error: Exception) -> "Answer":
        """What a client would be told of an exception."""
        told = HttpError.of(error)
        return cls(status=told.status, body=json.loads(told.body()))


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    custom_id: Annotated[str, Field(min_length=1, max_length=512), AfterValidator(check_text)]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


def read_jsonl(path: Path) -> Iterator[BatchRow | Mistake]:
    """The rows of an OpenAI batch file; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_schema(_Line, json.loads(line))
            except ValueError as error:  # neither Unicode nor JSON
                yield Mistake(number=number, message=f"is not valid JSON: {error}")
            except RequestValidationError as error:
                yield Mistake(number=number, message=HttpError.of(error).message)
            else:
                yield BatchRow(number=number, custom_id=row.custom_id, url=row.url, body=row.body)


def make_record(custom_id: str, answer: Answer) -> dict[str, Any]:
    """A line of the output file, or of the file of errors."""
    error = None
    if not answer.is_success:
        told = answer.body.get("error")
        told = told if isinstance(told, dict) else {}
        error = {"code": told.get("code"), "message": told.get("message")}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {
            "status_code": answer.status,
            "request_id": answer.body.get("id"),
            "body": answer.body,
        },
        "error": error,
    }


def is_success(record: Mapping[str, Any]) -> bool:
    """Whether a record belongs into the output file."""
    return record["error"] is None


def text_and_usage(body: Mapping[str, Any]) -> tuple[str, int, int]:
    """Of a response with one output its text, and the tokens of its prompt and of its output."""
    (choice,), usage = body["choices"], body["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, usage["prompt_tokens"], usage["completion_tokens"]


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as a line; half a surrogate pair, which UTF-8 cannot spell, is escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
