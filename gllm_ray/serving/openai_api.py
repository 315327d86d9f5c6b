"""The routes of OpenAI's API, over any service that runs token requests."""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import GenerationRequest
from gllm_ray.model.detokenizer import StopRule
from gllm_ray.serving.api_keys import KeyCheck
from gllm_ray.serving.errors import BodyLimit, install_error_handlers
from gllm_ray.serving.generation_requests import RequestBuilder
from gllm_ray.serving.long_json import dump_long
from gllm_ray.serving.openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
    StreamOptions,
)
from gllm_ray.serving.openai_responses import ChunkWriter, ResponseHead, response_body
from gllm_ray.serving.prompts import add_prompt_logprobs, with_echo
from gllm_ray.serving.responses_chat import as_chat, in_names_of_responses
from gllm_ray.serving.responses_request import ResponsesRequest
from gllm_ray.serving.responses_response import (
    GrowingResponse,
    ResponseEventWriter,
    new_response_id,
)
from gllm_ray.serving.service_api import router as service_router
from gllm_ray.serving.services import GenerationService, Services, TokenService, find_model
from gllm_ray.serving.streaming import stream_response
from gllm_ray.serving.text_stream import (
    TextDelta,
    collect_outputs,
    merge_deltas,
    text_deltas,
    with_tool_calls,
)
from gllm_ray.serving.tokenize_api import router as tokenize_router
from gllm_ray.serving.usage import UsageMeter

MAX_BODY_BYTES = 8 * 2**20


def build_api(
    *services: GenerationService,
    api_keys: Collection[str] = (),
    allowed_origins: Sequence[str] = (),
    stream_keep_alive_s: float | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application that serves one model, or several.

    Args:
        services: One for each model.
        api_keys: Of which requests must show one; empty: they need none.
        allowed_origins: Whose web pages may ask.
        stream_keep_alive_s: How long a stream may be silent; None: for ever.
        max_body_bytes: The most the body of a request may have.
    """
    # FastAPI's pages of documentation load scripts from elsewhere.
    app = FastAPI(title="gllm_ray", docs_url=None, redoc_url=None)
    app.state.services = {service.model_name: service for service in services}
    app.state.created = int(time.time())
    app.state.stream_keep_alive_s = stream_keep_alive_s
    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes)
    if api_keys:
        app.add_middleware(KeyCheck, keys=api_keys)
    if allowed_origins:
        # Around the keys, for a browser asks first whether it may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    install_error_handlers(app)
    app.include_router(router)
    app.include_router(tokenize_router)
    app.include_router(service_router)
    return app


router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, services: Services
) -> Response:
    """Answer a conversation, once or several times."""
    service = services[check_body(body, services)]
    head = _head(service, is_chat=True)
    builder = RequestBuilder(service.tokenizer, service.max_model_len)
    requests = await builder.from_chat(body, head.id)
    return await _respond(request, service, body, head, requests)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, services: Services) -> Response:
    """Continue a text, or several."""
    service = services[check_body(body, services)]
    head = _head(service, is_chat=False)
    builder = RequestBuilder(service.tokenizer, service.max_model_len)
    requests = await builder.from_completion(body, head.id)
    return await _respond(request, service, body, head, requests)


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request, services: Services) -> Response:
    """Answer a conversation once, in items; nothing of it is stored."""
    service = services[check_body(body, services)]
    chat, response_id = as_chat(body), new_response_id()
    builder = RequestBuilder(service.tokenizer, service.max_model_len)
    with in_names_of_responses():
        requests = await builder.from_chat(chat, response_id)
    response = GrowingResponse(body, response_id, service, requests)
    deltas = _deltas(service, chat, requests)
    if body.stream:
        writer = ResponseEventWriter(response)
        return await stream_response(deltas, writer, request.app.state.stream_keep_alive_s)
    async with aclosing(deltas):
        async for delta in deltas:
            response.grow(delta)
    return Response(response.to_json(), media_type="application/json")


@router.get("/v1/models")
async def list_models(request: Request, services: Services) -> Response:
    """The models."""
    cards = [_model_card(request, service) for service in services.values()]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request, services: Services) -> Response:
    """One of the models."""
    find_model(model, services)
    return JSONResponse(_model_card(request, services[model]))


async def whole_response(
    service: TokenService,
    body: GenerationParams,
    head: ResponseHead,
    requests: Sequence[GenerationRequest],
) -> dict[str, Any]:
    """Run the token requests of a body; the body of its response, when all have ended.

    Raises:
        GllmRayError: One of them failed; the others are aborted.
    """
    outputs = await collect_outputs(_deltas(service, body, requests), len(requests))
    meter = UsageMeter(requests, body.outputs_per_prompt)
    prompts = _prompts_to_tell(body, requests)
    if body.num_prompt_logprobs is None:
        return response_body(head, outputs, meter, prompts)
    # In a thread, because a long prompt takes long.
    response = await asyncio.to_thread(response_body, head, outputs, meter, prompts)
    if body.prompt_logprobs is not None:
        await asyncio.to_thread(
            add_prompt_logprobs, response, head, body.prompt_logprobs, requests, outputs
        )
    return response


def check_body(body: GenerationParams, model_names: Collection[str]) -> str:
    """Check what its schema alone does not tell; the name of its model.

    Raises:
        InvalidRequestError: The model is not one of those served, a stream's options are without a
            stream, or a stream is to have what it cannot; or nothing is to come.
    """
    model = find_model(body.model, model_names)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options is only allowed when stream is true", param="stream_options"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError(
            f"prompt_logprobs={body.prompt_logprobs}: is only allowed when stream is false",
            param="prompt_logprobs",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens=0: is only allowed when echo is true", param="max_tokens"
        )
    return model


async def _respond(
    http_request: Request,
    service: GenerationService,
    body: GenerationParams,
    head: ResponseHead,
    requests: Sequence[GenerationRequest],
) -> Response:
    if not body.stream:
        response = await whole_response(service, body, head, requests)
        if body.num_prompt_logprobs is None and not body.return_token_ids:
            return JSONResponse(response)
        # In a thread, because what is told of a long prompt takes long.
        text = await asyncio.to_thread(dump_long, response)
        return Response(text, media_type="application/json")
    options = body.stream_options or StreamOptions()
    writer = ChunkWriter(
        head,
        UsageMeter(requests, body.outputs_per_prompt),
        include_usage=bool(options.include_usage),
        is_usage_continuous=bool(options.continuous_usage_stats),
        prompts=_prompts_to_tell(body, requests),
    )
    deltas = _deltas(service, body, requests)
    return await stream_response(deltas, writer, http_request.app.state.stream_keep_alive_s)


def _prompts_to_tell(
    body: GenerationParams, requests: Sequence[GenerationRequest]
) -> list[tuple[int, ...]]:
    return [request.prompt_token_ids for request in requests] if body.return_token_ids else []


def _deltas(
    service: TokenService, body: GenerationParams, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[TextDelta, None]:
    streams = [
        _output_deltas(service, body, index, request) for index, request in enumerate(requests)
    ]
    if isinstance(body, CompletionRequest) and body.echo:
        streams = with_echo(streams, body, requests, service.tokenizer)
    return streams[0] if len(streams) == 1 else merge_deltas(streams)


def _output_deltas(
    service: TokenService, body: GenerationParams, index: int, request: GenerationRequest
) -> AsyncGenerator[TextDelta, None]:
    use, tokenizer = body.tool_use, service.tokenizer
    parser = use and use.new_parser(tokenizer)
    rule = StopRule(
        strings=body.stop or (),
        is_included=body.include_stop_str_in_output or False,
        min_tokens=body.min_tokens or 0,
        token_ids=body.stop_token_ids or (),
    )
    detokenizer = tokenizer.new_detokenizer(
        request.prompt_token_ids,
        rule,
        parser.markers if parser else (),
        skips_special=body.skip_special_tokens is not False,
    )
    deltas = text_deltas(index, service.generate(request), detokenizer)
    return with_tool_calls(deltas, parser, use) if use and parser else deltas


def _head(service: GenerationService, *, is_chat: bool) -> ResponseHead:
    return ResponseHead.new(
        model=service.model_name,
        is_chat=is_chat,
        token_bytes=service.tokenizer.vocabulary.token_bytes,
    )


def _model_card(request: Request, service: GenerationService) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "gllm_ray",
        "max_model_len": service.max_model_len,
    }
