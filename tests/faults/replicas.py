"""A replica of the demo model, requests for it, and ways to do it harm."""

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import ray
from ray.util.placement_group import placement_group_table

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.config import parse_service_config
from gllm_ray.engine.client import EngineClient
from gllm_ray.messages import GenerationRequest, LogitRules, SamplingParams, TokenEvent
from tests.ray.test_ray_pipeline import stage_processes

DEMO_MODEL = "package://gllm_ray/demo/model"
# Of the replica that tests share.
NUM_STAGES = 3
HEARTBEAT_TIMEOUT_S = 4


def make_config(num_stages, *, control_plane="refs", scheduler=None, **recovery):
    return parse_service_config(
        {
            # In bfloat16 prefill may round a near tie otherwise than decode did.
            "model": {"path": DEMO_MODEL, "dtype": "float32"},
            "pipeline": {
                "device": "cpu",
                "num_stages": num_stages,
                "cpus_per_stage": 0.5,
                "control_plane": control_plane,
            },
            "kv_cache": {"kv_cache_bytes": "8MiB"},
            "scheduler": scheduler or {},
            "recovery": {"backoff_s": 0.05, "heartbeat_s": 0.2, **recovery},
        }
    )


def make_request(name, *, prompt=None, num_tokens=40, max_tokens=40, **options):
    prompt = prompt or tuple(5 + (7 * ord(name[-1]) + 13 * i) % 900 for i in range(num_tokens))
    return GenerationRequest(
        request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, **options
    )


def make_requests():
    """Greedy ones, ones that sample with a seed, and ones whose tokens depend on those before."""
    sampled = SamplingParams(temperature=1.0, seed=17)
    penalties = LogitRules(
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((50, 2.0),)
    )
    few = range(300, 308)
    no_repetition = LogitRules(
        allowed_token_ids=tuple(few),
        bad_words=tuple((a, b, a) for a in few for b in few) + tuple((a, a) for a in few),
    )
    return [
        make_request(name, **options)
        for name, options in [
            ("greedy a", {}),
            ("greedy b", {}),
            ("sampled c", {"sampling": sampled}),
            ("sampled d", {"sampling": sampled}),
            ("greedy e", {"sampling": SamplingParams(logit_rules=penalties)}),
            ("sampled f", {"sampling": replace(sampled, logit_rules=penalties)}),
            ("greedy g", {"sampling": SamplingParams(logit_rules=no_repetition)}),
        ]
    ]


@dataclass
class Running:
    """A replica and the only client of it."""

    replica: PipelineReplica
    client: EngineClient
    num_accepted: int = field(default=0, init=False)

    async def collect(self, request, on_token=None) -> list[TokenEvent]:
        """The events, but for what the prefix cache had: that is of requests before this one."""
        events = []
        async for step in self.client.generate(request, tells_acceptance=True):
            self.num_accepted += not step
            events += [event._replace(num_cached_tokens=None) for event in step]
            if on_token is not None:
                on_token(len(events))
        return events

    async def collect_all(self, requests) -> list[list[TokenEvent]]:
        return await asyncio.gather(*map(self.collect, requests))

    async def pids(self) -> list[int]:
        stages = self.replica.group.stages
        return await asyncio.gather(*(stage.ping.remote() for stage in stages))

    async def harm(self, stage_id, signal_number=signal.SIGKILL) -> int:
        pid = (await self.pids())[stage_id]
        os.kill(pid, signal_number)
        return pid

    async def until_busy(self, num_requests):
        """Wait until so many more requests are accepted."""
        num_accepted = self.num_accepted + num_requests
        await until(lambda: self.num_accepted >= num_accepted)


_running = []  # and whether they have a placement group


@asynccontextmanager
async def running(config, placement_group=None):
    replica = await PipelineReplica.start(config, placement_group)
    client = EngineClient(replica)
    await client.start()
    entry = replica, placement_group is not None
    _running.append(entry)
    try:
        yield Running(replica, client)
    finally:
        _running.remove(entry)
        await client.close()
        await replica.close()


def check_nothing_is_left_behind(timeout_s=20):
    """Wait until there are only the actors and placement groups of the replicas that run."""
    expected = {
        "stages": sum(len(replica.group.stages) for replica, _ in _running),
        "schedulers": len(_running),
        "placement groups": sum(has_group for _, has_group in _running),
    }
    deadline_s = time.monotonic() + timeout_s
    while (found := _count_ours()) != expected:
        assert time.monotonic() < deadline_s, f"there are {found}, but {expected} are in use"
        time.sleep(0.05)


def _count_ours():
    groups = placement_group_table().values() if ray.is_initialized() else ()
    return {
        "stages": len(stage_processes(r"\w*Stage")),  # ours, and those of tests
        "schedulers": len(stage_processes("SchedulerActor")),
        "placement groups": sum(group["state"] != "REMOVED" for group in groups),
    }


async def until(is_true, timeout_s=10):
    """Wait for what no event tells; returns the seconds it took."""
    start_s = time.monotonic()
    while not is_true():
        assert time.monotonic() < start_s + timeout_s, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start_s


CAUSE, RECOVERED = "the pipeline stands still", "recovered"


def logged(caplog, start):
    """The lines of the log that begin so."""
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]
