"""A client that does not read, over real sockets: it costs nobody but itself."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from gllm_ray.serving.openai_api import build_api
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import BODIES, sse_chunks, wait_until

COMPLETION_PATH = "/v1/completions"
TEXT = " ".join(map(str, range(1000)))
BODY = BODIES[COMPLETION_PATH] | {"stream": True, "max_tokens": 4000}
SMALL_BUFFER_BYTES = 4096  # else the kernel takes the whole answer from the server


@asynccontextmanager
async def served(tokenizer):
    """The service, and the port that it answers at."""
    pipeline = ScriptedPipeline([*tokenizer.encode(TEXT), *tokenizer.stop_token_ids])
    async with LocalService(tokenizer, pipeline, max_model_len=5000, num_blocks=5000) as service:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
        config = uvicorn.Config(build_api(service), lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        yield service, listener.getsockname()[1]
        server.should_exit = True
        await serving


@asynccontextmanager
async def unread_stream(port):
    """A stream that has begun, of which nothing more is read by itself."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    client.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=SMALL_BUFFER_BYTES)
    body = json.dumps(BODY).encode()
    head = f"POST {COMPLETION_PATH} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await reader.readuntil(b"\r\n\r\n")
    yield reader, writer
    writer.transport.abort()


async def body_of(reader):
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    return body.decode()


def text_of(events):
    *chunks, done = sse_chunks(events)
    assert done == "[DONE]"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def ask(port):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        return text_of((await http.post(COMPLETION_PATH, json=BODY)).text)


@pytest.mark.parametrize("reads_on", [True, False])
def test_an_unread_stream_ends_frees_its_blocks_and_is_whole_if_its_client_reads_on(
    tokenizer, reads_on
):
    async def main():
        async with served(tokenizer) as (service, port), unread_stream(port) as (reader, writer):
            await service.until_idle()
            assert await ask(port) == TEXT
            assert len(service._client._streams) == 1, "nobody has read it yet"
            if reads_on:
                assert text_of(await body_of(reader)) == TEXT
            else:
                writer.transport.abort()
            await wait_until(lambda: not service._client._streams)

    asyncio.run(main())
