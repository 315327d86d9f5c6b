"""The routes over a replica in this process, and what clients of theirs get."""

from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import chain

from ray.util.placement_group import placement_group, remove_placement_group

from gllm_ray.bundles import bundles
from gllm_ray.config import ModelConfig
from gllm_ray.model.tokenizer import Tokenizer
from tests.faults.replicas import DEMO_MODEL, Running, running
from tests.serving.local_api import http_client, sse_chunks


@dataclass
class Service(Running):
    """A `GenerationService` over a replica."""

    tokenizer: Tokenizer
    max_model_len: int
    model_name: str = "demo"

    def generate(self, request):
        return self.client.generate(request)

    async def check_ready(self):
        await self.replica.check_health()

    async def server_info(self):
        return {"load": asdict(await self.replica.load())}


@asynccontextmanager
async def serving(config, group_bundles=None):
    """Yield the service of a replica with a placement group of its own, and an HTTP client."""
    group = placement_group(group_bundles or bundles(config))
    try:
        async with running(config, group) as pipeline:
            service = Service(
                pipeline.replica,
                pipeline.client,
                Tokenizer.for_model(ModelConfig(path=DEMO_MODEL)),
                pipeline.replica.group.max_model_len,
            )
            async with http_client(service) as http:
                yield service, http
    finally:
        remove_placement_group(group)


async def complete(http, body):
    """Text, usage and the tokens that log probabilities tell of, of a completion, streamed or not.

    Those of a token that is computed again may differ in their last digits.
    """
    if not body.get("stream"):
        answer = (await http.post("/v1/completions", json=body, timeout=60)).json()
        return answer["choices"][0]["text"], without_cached(answer["usage"]), []
    body = body | {"stream_options": {"include_usage": True}}
    answer = await http.post("/v1/completions", json=body, timeout=60)
    *chunks, end = sse_chunks(answer.text)
    assert end == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    scored = [choice["logprobs"]["tokens"] for choice in choices if choice["logprobs"]]
    text = "".join(choice["text"] for choice in choices)
    return text, without_cached(chunks[-1]["usage"]), list(chain.from_iterable(scored))


def without_cached(usage):
    """All of a usage that is the same whatever the service computed before."""
    cached = usage.pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < usage["prompt_tokens"]
    return usage
