"""What load balancers, probes and people ask of the service itself."""

import asyncio

import pytest

import gllm_ray
from gllm_ray.errors import StageLostError
from gllm_ray.serving.observability import METRIC_PREFIX
from tests.serving.local_api import BODIES, local_api, wait_until

PATH, *_ = BODIES


def ask(tokenizer, method, path):
    async def main():
        async with local_api(tokenizer) as (_, http):
            return await http.request(method, path)

    return asyncio.run(main())


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_that_of_the_engine(tokenizer, path):
    async def main():
        async with local_api(tokenizer, "x", hold_after=0) as (service, http):
            methods = ("GET", "HEAD")
            healthy = [await http.request(method, path) for method in methods]
            request = asyncio.create_task(http.post(PATH, json=BODIES[PATH]))
            await wait_until(lambda: service.requests)
            service.pipeline.failure = StageLostError("stage 0 died")
            service.pipeline.release()
            failed = [await request, *[await http.request(method, path) for method in methods]]
            return healthy, failed, await http.get("/v1/models")

    healthy, failed, models = asyncio.run(main())
    assert [response.status_code for response in [*healthy, models]] == [200] * 3
    assert [response.status_code for response in failed] == [503] * 3
    for response in failed[:2]:
        assert response.json()["error"]["message"] == StageLostError.public_message


def test_the_service_tells_about_itself(tokenizer):
    info = ask(tokenizer, "GET", "/server_info").json()
    assert info == {"model": "demo/model", "kv_utilization": 0}
    assert ask(tokenizer, "GET", "/version").json() == {"version": gllm_ray.__version__}


def test_who_scrapes_the_service_is_told_where_its_metrics_are(tokenizer):
    response = ask(tokenizer, "GET", "/metrics")
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert "--metrics-export-port" in message
    assert f"ray_{METRIC_PREFIX}" in message
