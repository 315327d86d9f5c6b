"""What the scheduler learns of outputs that end at a stop string, which it does not know."""

import asyncio
import json

import pytest

from gllm_ray.engine.length_log import LoggedPredictor
from gllm_ray.scheduling.length_predictor import HintPredictor
from tests.serving.local_api import BODIES, local_api, wait_until

TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture
def lengths(tmp_path):
    return Lengths(tmp_path / "lengths")


class Lengths:
    """A predictor, and the lengths that it was told."""

    def __init__(self, path):
        self.predictor = LoggedPredictor(HintPredictor(), path, 2**20)
        self._path = path

    def told(self):
        return [json.loads(line)["num_output_tokens"] for line in self._path.read_text().split()]


async def ask(http, path, change):
    answer = await http.post(path, json=BODIES[path] | {"max_tokens": 90, "stop": "four"} | change)
    assert answer.status_code == 200
    return answer


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("path", BODIES)
def test_an_output_counts_with_the_tokens_up_to_its_stop_string(
    tokenizer, lengths, path, is_streamed
):
    async def main():
        async with local_api(tokenizer, TEXT, predictor=lengths.predictor) as (service, http):
            usage = (await ask(http, path, {})).json()["usage"]
            await ask(http, path, {"stream": is_streamed, "n": 2})
            await service.until_idle()
        return usage["completion_tokens"]

    num_tokens = asyncio.run(main())
    assert lengths.told() == [num_tokens] * 3
    assert num_tokens < len(tokenizer.encode(TEXT))


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_teaches_nothing(tokenizer, lengths, path, is_streamed):
    async def main():
        options = {"hold_after": 3, "predictor": lengths.predictor}
        async with local_api(tokenizer, TEXT, **options) as (service, http):
            call = asyncio.create_task(ask(http, path, {"stream": is_streamed}))
            await wait_until(lambda: service.pipeline.num_tokens >= 3)
            call.cancel()
            await asyncio.wait([call])
            service.pipeline.release()
            await service.until_idle()

    asyncio.run(main())
    assert lengths.told() == []
