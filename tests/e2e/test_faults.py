"""A process of the running service dies."""

import os
import signal
import urllib.request

import openai
import pytest

PROMPT = "def f("
NUM_TOKENS = 300


def processes_of(service, actor):
    names = ((process.pid, process.name()) for process in service.processes())
    # The system cuts long names.
    return [pid for pid, name in names if name.startswith(f"ray::{actor}"[:15])]


@pytest.mark.parametrize(("actor", "number"), [("StageActor", 2), ("SchedulerActor", 1)])
def test_an_open_stream_goes_on_as_if_nothing_had_died(service, truth, actor, number):
    text, usage, killed = "", None, None
    with openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="x", max_retries=0) as client:
        for chunk in client.completions.create(
            model=service.model,
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            text += chunk.choices[0].text if chunk.choices else ""
            if text and killed is None:
                killed = processes_of(service, actor)[0]
                os.kill(killed, signal.SIGKILL)
                with urllib.request.urlopen(f"{service.base_url}/health") as response:
                    assert response.status == 200
    assert text == truth.complete(PROMPT, NUM_TOKENS)
    prompt_ids = truth.tokenizer(PROMPT)["input_ids"]
    assert usage.prompt_tokens == len(prompt_ids)
    assert usage.completion_tokens == len(truth.generate(prompt_ids, NUM_TOKENS))
    assert service.wait_until_idle()["kv_utilization"] == 0
    living = processes_of(service, actor)
    assert len(living) == number
    assert killed not in living
