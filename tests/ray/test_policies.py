"""The demo model on a cluster, under each policy: one line of YAML apart."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gllm_ray.assembly.remote_scheduler import RemoteScheduler
from gllm_ray.config import parse_service_config, resolve_package_path
from gllm_ray.engine.client import EngineClient
from gllm_ray.messages import FinishReason, GenerationRequest
from gllm_ray.model.tokenizer import Tokenizer
from tests.pipelines import RayStages

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
POLICIES = ["token_throttling", "chunked_prefill", "prefill_first", "temporal", "balanced"]
PROMPTS = [
    "The pipeline has two stages.",
    "def fibonacci(n):",
    "import asyncio\n\n\nclass Queue:",
    "What is a list?",
] * 6
MAX_TOKENS = 24


def demo_config(policy, *, ring):
    text = DEMO.read_text()
    args = "    args:\n"
    assert args in text
    text = text.replace(args, f"{args}      scheduler: {{policy: {policy}}}\n")
    (application,) = yaml.safe_load(text)["applications"]
    application["args"]["pipeline"]["ring"] = ring
    return parse_service_config(application["args"])


@pytest.fixture(scope="module")
def prompts():
    tokenizer = Tokenizer.load("package://gllm_ray/demo/model")
    # All differ, so that none is a copy of another's.
    return [tuple(tokenizer.encode(f"{i} {prompt}")) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def greedy(prompts):
    """What transformers makes of them."""
    path = resolve_package_path("package://gllm_ray/demo/model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)
            outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module")
def stages(ray_cluster):
    """The demo's, for one scheduler after another: to them, all policies are alike."""
    stages = RayStages(demo_config(POLICIES[0], ring=False))
    yield stages
    stages.stop()


async def run(config, stages, prompts):
    """The tokens of each request and why it ended, all sent at once."""
    stop_token_ids = Tokenizer.for_model(config.model).stop_token_ids
    scheduler = RemoteScheduler.launch(config)
    try:
        await scheduler.start(replace(await stages.connect(), ring=config.pipeline.ring))
        client = EngineClient(scheduler)
        await client.start()

        async def ask(index, prompt):
            request = GenerationRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_tokens=MAX_TOKENS,
                stop_token_ids=stop_token_ids,
            )
            events = [event async for step in client.generate(request) for event in step]
            return [event.token_id for event in events], events[-1].finish_reason

        answers = await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(prompts)))
        load = await scheduler.load()
        await client.close()
        return answers, load
    finally:
        scheduler.kill()


@pytest.mark.parametrize(
    ("policy", "ring"),
    [*((policy, False) for policy in POLICIES), ("balanced", True)],
)
def test_each_policy_gives_the_same_greedy_tokens_and_loses_nothing(
    policy, ring, stages, prompts, greedy
):
    config = demo_config(policy, ring=ring)
    assert config.scheduler.policy.name == policy
    answers, load = asyncio.run(run(config, stages, prompts))
    assert [tokens for tokens, _ in answers] == greedy
    assert {reason for _, reason in answers} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert (load.num_requests, load.kv_utilization) == (0, 0)
