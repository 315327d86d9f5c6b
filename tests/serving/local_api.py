"""The application in this process: real routes, real engine, a model that recites a text."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import openai
import uvicorn

from gllm_ray.demo.serve_process import free_port
from gllm_ray.serving.openai_api import build_api
from tests.fakes import LocalService, ScriptedPipeline

CHAT = [{"role": "user", "content": "Write a function."}]
BODIES = {
    "/v1/chat/completions": {"model": LocalService.model_name, "messages": CHAT},
    "/v1/completions": {"model": LocalService.model_name, "prompt": "def f"},
}


@asynccontextmanager
async def http_client(*services, **options):
    """Yield an HTTP client of the routes over a service, or several."""
    app = build_api(*services, **{"max_body_bytes": 2**20} | options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@asynccontextmanager
async def listening(*services, **options):
    """The address of the routes over a service, or several, on a socket."""
    app, port = build_api(*services, **options), free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await task


@asynccontextmanager
async def local_api(
    tokenizer,
    text="",
    *,
    script=None,
    pipeline=None,
    hold_after=None,
    max_body_bytes=2**20,
    api_keys=(),
    allowed_origins=(),
    stream_keep_alive_s=None,
    **service_options,
):
    """Yield the service and an HTTP client; the model says `text` and ends, or follows `script`."""
    if script is None:
        script = [*tokenizer.encode(text), *tokenizer.stop_token_ids]
    pipeline = pipeline or ScriptedPipeline(script, hold_after=hold_after)
    async with (
        LocalService(tokenizer, pipeline, **service_options) as service,
        http_client(
            service,
            max_body_bytes=max_body_bytes,
            api_keys=api_keys,
            allowed_origins=allowed_origins,
            stream_keep_alive_s=stream_keep_alive_s,
        ) as http,
    ):
        yield service, http


@asynccontextmanager
async def openai_client(tokenizer, text, **options):
    """Yield the service and OpenAI's own client."""
    async with local_api(tokenizer, text, **options) as (service, http):
        yield service, openai_over(http)


def openai_over(http) -> openai.AsyncOpenAI:
    """OpenAI's own client, which tells of the first failure."""
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
    )


async def wait_until(condition) -> None:
    """Wait for what the application and the engine come to between them."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - there is no one event to wait for
            await asyncio.sleep(0.001)


def sse_chunks(body: str) -> list[dict | str]:
    """The data of each event, parsed but for `[DONE]`."""
    *events, rest = body.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    data = [event.removeprefix("data: ") for event in events]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
