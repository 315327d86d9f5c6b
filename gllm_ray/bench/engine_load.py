"""Requests straight to an engine: no HTTP, no text."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.bench.load_generator import RequestRecord, Send
from gllm_ray.bench.prompts import PROMPT_VOCAB_SIZE, LoadRequest
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import InvalidRequestError, PipelineError
from gllm_ray.messages import FinishReason, GenerationRequest
from gllm_ray.model.checkpoint import open_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """The engine of a service on the Ray cluster that this process is connected to.

    Attributes:
        client: Its client in this process.
        replica: Its processes.
    """

    client: EngineClient
    replica: PipelineReplica


@asynccontextmanager
async def run_engine(config: ServiceConfig) -> AsyncIterator[RunningEngine]:
    """Start the engine of a service, and end all of its processes.

    Raises:
        ConfigError: The model cannot be served as configured.
        PipelineError: A process died.
    """
    replica = await PipelineReplica.start(config)
    client = EngineClient(replica)
    try:
        await client.start()
        yield RunningEngine(client=client, replica=replica)
    finally:
        await client.close()
        await replica.close()


def engine_sender(client: EngineClient) -> Send:
    """What sends requests to an engine, greedily and to their last token."""

    async def send(request: LoadRequest, record: RequestRecord) -> None:
        reason = None
        async for events in client.generate(to_generation_request(request)):
            num_tokens = sum(event.token_id is not None for event in events)
            if num_tokens:
                record.note_message()
            record.num_output_tokens += num_tokens
            reason = events[-1].finish_reason
        if reason is not FinishReason.LENGTH:
            raise PipelineError(f"ended with {reason}; must end with length")
        record.num_prompt_tokens = request.num_prompt_tokens

    return send


def to_generation_request(request: LoadRequest) -> GenerationRequest:
    """What an engine is asked for.

    Raises:
        InvalidRequestError: The prompt is text, which only a service with a tokenizer takes.
    """
    if isinstance(request.prompt, str):
        raise InvalidRequestError("the prompt is text; must be token ids")
    return GenerationRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt,
        max_tokens=request.num_output_tokens,
        expected_output_tokens=request.expected_output_tokens,
        tenant=request.tenant,
        priority=request.priority,
    )


def prompt_vocab_size(config: ServiceConfig) -> int:
    """Token ids that prompts for a model may have."""
    path = open_checkpoint(config.model).directory / "config.json"
    hf_config = json.loads(path.read_text(encoding="utf-8"))
    vocab_size: int = hf_config.get("text_config", hf_config)["vocab_size"]
    return min(PROMPT_VOCAB_SIZE, vocab_size)
