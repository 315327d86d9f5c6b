"""From a row to token requests: the schema, the checks and the conversion of the HTTP routes."""

from dataclasses import dataclass

from gllm_ray.batch.records import BatchRow
from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import GenerationRequest
from gllm_ray.serving.generation_requests import RequestBuilder
from gllm_ray.serving.openai_api import check_body
from gllm_ray.serving.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
)
from gllm_ray.serving.request_schema import parse_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestChecks:
    """What a row must pass before a job runs.

    Attributes:
        model_name: The one model, as clients name it.
        builder: Makes token requests; None: the service that is asked does that.
        is_single: Whether a row may have one output only, which is a text.
    """

    model_name: str
    builder: RequestBuilder | None
    is_single: bool = False

    def parse_body(self, row: BatchRow) -> GenerationParams:
        """The body of a row, checked as its route does.

        Raises:
            InvalidRequestError: The service would refuse it, or it is for a stream.
            RequestValidationError: It is against the route's schema.
        """
        is_chat = row.url == "/v1/chat/completions"
        body = parse_schema(ChatCompletionRequest if is_chat else CompletionRequest, row.body)
        check_body(body, (self.model_name,))
        if body.stream:
            raise InvalidRequestError("stream=True: must be left out of a batch", param="stream")
        if self.is_single and body.outputs_per_prompt > 1:
            raise InvalidRequestError(
                f"n={body.outputs_per_prompt}: must be 1, a table has one text a row", param="n"
            )
        if self.is_single and body.prompt_logprobs is not None:
            raise InvalidRequestError(
                f"prompt_logprobs={body.prompt_logprobs}: must be left out, a table has one text a "
                "row; write JSONL for them",
                param="prompt_logprobs",
            )
        if self.is_single and body.tool_use is not None:
            raise InvalidRequestError(
                "tools: must be left out, or tool_choice be none: a table has one text a row, and "
                "no tool calls; write JSONL for them",
                param="tools",
            )
        if self.is_single and body.return_token_ids:
            raise InvalidRequestError(
                "return_token_ids=True: must be left out, a table has one text a row, and no token "
                "ids; write JSONL for them",
                param="return_token_ids",
            )
        return body

    async def check(self, row: BatchRow) -> None:
        """Return if a service of the model would run a row.

        Raises:
            InvalidRequestError: It would not.
            RequestValidationError: It is against the route's schema.
        """
        body = self.parse_body(row)
        if self.builder is not None:
            await build_requests(self.builder, body, "check")
        elif isinstance(body, CompletionRequest):
            body.check_num_outputs()


async def build_requests(
    builder: RequestBuilder, body: GenerationParams, name: str
) -> list[GenerationRequest]:
    """The token requests of a body.

    Raises:
        InvalidRequestError: The model cannot serve it.
    """
    match body:
        case ChatCompletionRequest():
            return await builder.from_chat(body, name)
        case CompletionRequest():
            return await builder.from_completion(body, name)
    raise TypeError(f"{type(body).__name__} is the body of no route")
