"""A stage of the running service dies."""

import os
import signal
import time

import openai
import pytest

RECOVERY_TIMEOUT_S = 90


def stage_process(service):
    for process in service.processes():
        if process.name().startswith("ray::StageActor"):
            return process.pid
    pytest.fail("there is no stage process")


def test_open_streams_end_with_an_error_and_the_replica_is_replaced(service):
    with openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(
            model=service.model,
            prompt="def f(",
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        os.kill(stage_process(service), signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(openai.APIError, match="stage"):
            list(stream)
        assert time.monotonic() - killed < 2

        deadline = killed + RECOVERY_TIMEOUT_S
        while True:
            try:
                answer = client.completions.create(model=service.model, prompt="a", max_tokens=2)
            except openai.APIError:
                assert time.monotonic() < deadline, "the replica was not replaced"
                time.sleep(0.5)
            else:
                break
    assert answer.usage.completion_tokens == 2
