"""Several models behind the same routes, and streams that outlive replicas."""

import asyncio
from collections import deque
from itertools import chain

import pytest

from gllm_ray.config import FrontEndConfig
from gllm_ray.engine.resumption import ResumingClient
from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatchResult, TokenLogprobs
from tests.replica_set import Fault, Replicas
from tests.serving.local_api import BODIES, http_client, sse_chunks

_, COMPLETION_PATH = BODIES
TEXT = "naïve € 😀 and so on, until the very end"
PROMPT = [5, 6, 7]


class RecitingPipeline:
    """A pipeline whose model goes on with a text wherever a sequence stands in it."""

    def __init__(self, script, num_prompt_tokens):
        self._script = script
        self._num_prompt_tokens = num_prompt_tokens
        self._queue = deque()

    def submit(self, batch):
        self._queue.append(batch)

    async def next_result(self):
        await asyncio.sleep(0)
        batch = self._queue.popleft()
        token_ids = tuple(
            self._script[item.end - self._num_prompt_tokens]
            for item in batch.sequences
            if item.sampling is not None
        )
        logprobs = tuple(TokenLogprobs(-float(token_id), ()) for token_id in token_ids)
        return MicroBatchResult(batch_id=batch.batch_id, token_ids=token_ids, logprobs=logprobs)

    async def close(self):
        pass


class RemoteModel:
    """A `GenerationService` over replicas in this process."""

    max_model_len = 128

    def __init__(self, name, tokenizer, replicas, failure=None):
        self.model_name = name
        self.tokenizer = tokenizer
        self.generate = ResumingClient(replicas, FrontEndConfig()).generate
        self._failure = failure

    async def check_ready(self):
        if self._failure is not None:
            raise self._failure

    async def server_info(self):
        return {"model": self.model_name}


def replicas_of(tokenizer, faults=()):
    script = [*tokenizer.encode(TEXT), *tokenizer.stop_token_ids]
    return Replicas(lambda: RecitingPipeline(script, len(PROMPT)), faults)


def ask(tokenizer, faults, change):
    """The answer to a completion, after some faults."""

    async def main():
        async with replicas_of(tokenizer, faults) as replicas:
            model = RemoteModel("one", tokenizer, replicas)
            async with http_client(model) as http:
                body = {"model": "one", "prompt": PROMPT, "max_tokens": 100} | change
                answer = await http.post(COMPLETION_PATH, json=body)
        assert len(replicas.outputs) == len(faults) + 1
        return answer

    return asyncio.run(main())


@pytest.mark.parametrize("change", [{}, {"stop": ["very"]}, {"max_tokens": 9}], ids=str)
@pytest.mark.parametrize("num_steps", range(1, 8))
def test_a_stream_is_the_same_wherever_its_replica_was_lost(tokenizer, change, num_steps):
    """Also in the middle of a character of several tokens, or of what may be a stop string."""
    change = {"stream": True, "stream_options": {"include_usage": True}, **change}
    expected = join(ask(tokenizer, [], change))
    assert join(ask(tokenizer, [Fault(after=num_steps)], change)) == expected
    whole = ask(
        tokenizer, [Fault(after=num_steps)], {**change, "stream": None, "stream_options": None}
    )
    (choice,) = whole.json()["choices"]
    told = choice["text"], choice["finish_reason"], whole.json()["usage"]
    assert (*told, choice["logprobs"]["token_logprobs"]) == expected
    assert len(expected[-1]) == told[-1]["completion_tokens"]


def join(answer):
    """Text, finish reason, usage and log probabilities of a stream."""
    *chunks, done = sse_chunks(answer.text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    scored = [choice["logprobs"]["token_logprobs"] for choice in choices if choice["logprobs"]]
    text = "".join(choice["text"] for choice in choices)
    return text, reasons[-1], chunks[-1]["usage"], list(chain.from_iterable(scored))


def test_each_request_goes_to_its_model_and_an_unknown_one_is_told_which_there_are(tokenizer):
    async def main():
        async with replicas_of(tokenizer) as one, replicas_of(tokenizer) as two:
            services = [RemoteModel("one", tokenizer, one), RemoteModel("org/two", tokenizer, two)]
            async with http_client(*services) as http:
                listed = (await http.get("/v1/models")).json()["data"]
                assert [model["id"] for model in listed] == ["one", "org/two"]
                body = {"model": "org/two", "prompt": PROMPT, "max_tokens": 3}
                answer = (await http.post(COMPLETION_PATH, json=body)).json()
                assert answer["model"] == "org/two"
                assert (len(one.outputs), len(two.outputs)) == (0, 1)
                assert (await http.get("/v1/models/org/two")).json()["id"] == "org/two"
                info = (await http.get("/server_info")).json()
                assert info == {"models": [{"model": "one"}, {"model": "org/two"}]}
                for path, body in BODIES.items():
                    refused = await http.post(path, json=body | {"model": "three"})
                    assert refused.status_code == 404
                    error = refused.json()["error"]
                    assert error["code"] == "model_not_found"
                    assert "'one', 'org/two'" in error["message"]
                    refused = await http.post(path, json=body | {"model": None})
                    assert refused.status_code == 400
                    message = refused.json()["error"]["message"]
                    assert message == "model: is required; this server has 'one', 'org/two'"

    asyncio.run(main())


@pytest.mark.parametrize("is_other_healthy", [True, False])
def test_a_front_end_is_healthy_while_one_of_its_models_is(tokenizer, is_other_healthy):
    failure = PipelineError("no replica", public_message="none runs")

    async def main():
        async with replicas_of(tokenizer) as replicas:
            services = [
                RemoteModel("one", tokenizer, replicas, failure),
                RemoteModel("two", tokenizer, replicas, None if is_other_healthy else failure),
            ]
            async with http_client(*services) as http:
                return await http.get("/health")

    answer = asyncio.run(main())
    assert answer.status_code == (200 if is_other_healthy else 503)
    if not is_other_healthy:
        assert answer.json()["error"]["message"] == "none runs"
