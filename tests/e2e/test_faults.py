"""A process of the running service dies."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import httpx
import openai
import psutil
import pytest

PROMPT = "def f("
NUM_TOKENS = 300


def processes_of(service, actor):
    return [pid for pid, title in service.titles().items() if title.startswith(f"ray::{actor}")]


@pytest.mark.parametrize(("actor", "number"), [("StageActor", 2), ("SchedulerActor", 1)])
def test_an_open_stream_goes_on_as_if_nothing_had_died(service, truth, actor, number):
    text, usage, killed = "", None, None
    with openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="x", max_retries=0) as client:
        body = {"model": service.model, "prompt": PROMPT, "temperature": 0}
        client.completions.create(**body, max_tokens=1)  # the prompt is known then
        for chunk in client.completions.create(
            **body,
            max_tokens=NUM_TOKENS,
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
    assert usage.prompt_tokens_details.cached_tokens == len(prompt_ids) - 1 > 0
    assert service.wait_until_idle()["kv_utilization"] == 0
    living = processes_of(service, actor)
    assert len(living) == number
    assert killed not in living


def test_an_idle_service_costs_next_to_nothing(service):
    actors, seconds = ("ServeReplica", "SchedulerActor", "StageActor"), 4
    pids = [pid for actor in actors for pid in processes_of(service, actor)]

    def cpu_s():
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return [time.user + time.system for time in times]

    service.wait_until_idle()
    before = cpu_s()
    time.sleep(seconds)
    spent_s = [after - start for start, after in zip(before, cpu_s(), strict=True)]
    assert len(spent_s) == 4
    assert max(spent_s) < 0.05 * seconds, spent_s


def stream_completion(service, on_text):
    """The text of a streamed completion; `on_text` is called when some has come."""
    text = ""
    with openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="x", max_retries=0) as client:
        for chunk in client.completions.create(
            model=service.model, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, stream=True
        ):
            if chunk.choices and chunk.choices[0].text:
                text += chunk.choices[0].text
                on_text()
    return text


def wait_until(condition, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.chaos
def test_serving_goes_on_while_the_controller_of_serve_is_replaced(service, truth):
    killed = []

    def kill_controller():
        if not killed:
            killed.extend(processes_of(service, "ServeController"))
            os.kill(killed[0], signal.SIGKILL)

    expected = truth.complete(PROMPT, NUM_TOKENS)
    assert stream_completion(service, kill_controller) == expected
    assert stream_completion(service, lambda: None) == expected
    wait_until(lambda: processes_of(service, "ServeController") not in ([], killed))
    assert stream_completion(service, lambda: None) == expected
    assert len(processes_of(service, "StageActor")) == 2, "the pipeline is the same"
    assert len(killed) == 1


def placement_groups(service):
    """Those that exist on the Ray of the service."""
    titles = service.titles().values()
    address = next(filter(None, (re.search(r"--gcs-address=(\S+)", each) for each in titles)))
    code = (
        "import ray; from ray.util.placement_group import placement_group_table; "
        f"ray.init(address={address.group(1)!r}, logging_level='ERROR', log_to_driver=False); "
        "print(sum(g['state'] != 'REMOVED' for g in placement_group_table().values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout.splitlines()[-1])


def is_answered(service):
    try:
        return stream_completion(service, lambda: None)
    except (openai.OpenAIError, httpx.HTTPError):
        return False


@pytest.mark.chaos
def test_who_streams_from_a_replica_that_dies_gets_an_end_and_nothing_is_left_behind(
    service, truth
):
    actors = ("ServeReplica", "SchedulerActor", "StageActor")
    killed = {actor: set(processes_of(service, actor)) for actor in actors}
    before = placement_groups(service)

    def kill_replica():
        with contextlib.suppress(ProcessLookupError):
            for pid in killed["ServeReplica"]:
                os.kill(pid, signal.SIGKILL)

    start_s = time.monotonic()
    with pytest.raises((openai.OpenAIError, httpx.HTTPError)):
        stream_completion(service, kill_replica)
    assert time.monotonic() < start_s + 15
    wait_until(lambda: is_answered(service))
    assert stream_completion(service, lambda: None) == truth.complete(PROMPT, NUM_TOKENS)
    wait_until(
        lambda: [len(processes_of(service, actor)) for actor in actors] == [1, 1, 2], timeout_s=20
    )
    for actor in actors:
        assert not killed[actor] & set(processes_of(service, actor))
    wait_until(lambda: placement_groups(service) == before, timeout_s=20)
