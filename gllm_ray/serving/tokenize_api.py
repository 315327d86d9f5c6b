"""vLLM's routes from text to tokens and back, as the model of a request reads them."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, FailFast, Field

from gllm_ray.errors import InvalidRequestError
from gllm_ray.serving.conversation import Conversation
from gllm_ray.serving.generation_requests import RequestBuilder
from gllm_ray.serving.request_schema import RequestSchema, check_text, only, parse_schema
from gllm_ray.serving.services import Services, find_model
from gllm_ray.serving.token_ids import check_token_ids
from gllm_ray.serving.tool_use import check_shows_tools

# More than any context has room for; the answer, which holds the streams up, takes a third of a
# second to write.
_MAX_TOKENS = 2**20


class _Question(RequestSchema):
    model: str | None = None


class TokenizeTextRequest(_Question):
    """The body of POST /tokenize for a text, as /v1/completions takes it."""

    prompt: Annotated[str, AfterValidator(check_text)]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(_Question, Conversation):
    """The body of POST /tokenize for a conversation, as /v1/chat/completions takes it."""

    add_special_tokens: Annotated[object, only(False)] = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Question):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], FailFast()] = Field(max_length=_MAX_TOKENS)


router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: Annotated[dict[str, Any], Body()], services: Services) -> Response:
    """The tokens of a text or of a conversation."""
    if ("messages" in body) == ("prompt" in body):
        raise InvalidRequestError("the body must have either prompt or messages", param="prompt")
    schema = TokenizeChatRequest if "messages" in body else TokenizeTextRequest
    question: TokenizeChatRequest | TokenizeTextRequest = parse_schema(schema, body)
    service = services[find_model(question.model, services)]
    tokens = await _tokens(RequestBuilder(service.tokenizer, service.max_model_len), question)
    if len(tokens) > _MAX_TOKENS:
        raise InvalidRequestError(
            f"the text has {len(tokens)} tokens; the limit is {_MAX_TOKENS}, so send it in parts"
        )
    names = None
    if question.return_token_strs:
        names = await asyncio.to_thread(service.tokenizer.vocabulary.names, tokens)
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": service.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: Services) -> Response:
    """The text of tokens."""
    tokenizer = services[find_model(body.model, services)].tokenizer
    check_token_ids("tokens", body.tokens, tokenizer.vocab_size)
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})


async def _tokens(
    builder: RequestBuilder, question: TokenizeChatRequest | TokenizeTextRequest
) -> list[int]:
    if isinstance(question, TokenizeTextRequest):
        return await builder.text_prompt(
            question.prompt, add_special_tokens=question.add_special_tokens is not False
        )
    if question.tools:
        check_shows_tools(builder.tokenizer)
    return await builder.chat_prompt(question)
