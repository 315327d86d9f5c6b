"""A whole replica on a cluster: stages, scheduler actor, and a client of it."""

import asyncio
import json
import logging
import os
import signal
import time

import pytest
import ray

from gllm_ray.assembly.remote_scheduler import RemoteScheduler
from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.config import RecoveryConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import (
    ConfigError,
    InvalidRequestError,
    PipelineError,
    SchedulerLostError,
    StageLostError,
)
from gllm_ray.messages import FinishReason, GenerationRequest
from gllm_ray.serving.server import LLMServer
from gllm_ray.stages.stage_group import StageGroup
from gllm_ray.stages.supervised_pipeline import Fault
from tests.pipelines import make_service_config
from tests.ray.test_ray_pipeline import stage_processes
from tests.serving.local_api import http_client

NUM_REQUESTS = 8


async def collect(client, request):
    """Every event of a request, and the error that ended its stream."""
    events = []
    try:
        async for step in client.generate(request):
            events += step
    except PipelineError as error:
        return events, error
    return events, None


def requests_of(prompts, max_tokens):
    return [
        GenerationRequest(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=max_tokens)
        for i, prompt in enumerate(prompts)
    ]


async def check_generation(client, reference):
    wanted = requests_of(reference.prompts, len(reference.outputs[0]))
    answers = await asyncio.gather(*(collect(client, request) for request in wanted))
    assert [[event.token_id for event in events] for events, _ in answers] == reference.outputs
    assert {events[-1].finish_reason for events, _ in answers} == {FinishReason.LENGTH}


async def check_refusal(client):
    (request,) = requests_of([[1, 2]], max_tokens=1000)
    with pytest.raises(InvalidRequestError) as caught:
        await anext(client.generate(request))
    assert caught.value.code == "context_length_exceeded"


async def check_loss_of_a_stage(client, replica):
    wanted = requests_of([[i + 1, i + 2] for i in range(NUM_REQUESTS)], max_tokens=120)
    streams = [asyncio.create_task(collect(client, request)) for request in wanted]
    while (await replica.load()).num_requests < NUM_REQUESTS:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    os.kill(await replica.group.stages[1].ping.remote(), signal.SIGKILL)
    killed = time.monotonic()
    for events, error in await asyncio.gather(*streams):
        ends = [event.error for event in events if event.finish_reason is not None]
        assert isinstance(error, StageLostError) or ends == [StageLostError.public_message]
    assert time.monotonic() - killed < 2
    with pytest.raises(PipelineError):
        await replica.check_health()
    with pytest.raises(PipelineError):
        await anext(client.generate(wanted[0]))


def without_recovery(model, num_stages):
    config = make_service_config(model, num_stages=num_stages, cpus_per_stage=0.5)
    return config.model_copy(update={"recovery": RecoveryConfig(enabled=False)})


def actor_processes():
    return stage_processes() | stage_processes("SchedulerActor")


async def wait_until_gone(processes):
    deadline = time.monotonic() + 5
    while processes & actor_processes():
        assert time.monotonic() < deadline, "an actor outlived its replica"
        await asyncio.sleep(0.05)


def test_without_recovery_a_replica_serves_until_a_stage_dies_and_then_ends_every_request(
    ray_cluster, tiny_llama, reference
):
    async def scenario():
        others = actor_processes()
        replica = await PipelineReplica.start(without_recovery(tiny_llama, num_stages=2))
        own = actor_processes() - others
        client = EngineClient(replica)
        await client.start()
        await replica.check_health()
        await check_generation(client, reference)
        await check_refusal(client)
        await check_loss_of_a_stage(client, replica)
        await client.close()
        await replica.close()
        await wait_until_gone(own)

    asyncio.run(scenario())


@ray.remote(num_cpus=0)
class CallLog:
    """Notes in which order an asyncio actor takes the calls of a scheduler."""

    def __init__(self):
        self.calls = []

    async def add(self, request):
        self.calls.append(("add", request.request_id))

    async def abort(self, request_id, _num_output_tokens):
        self.calls.append(("abort", request_id))

    async def all(self):
        return self.calls


def test_the_abort_of_a_large_request_never_overtakes_it(ray_cluster):
    async def scenario():
        scheduler = RemoteScheduler(actor := CallLog.remote())
        names = [str(i) for i in range(20)]
        for name in names:
            # So large that Ray sends it by the object store.
            large = GenerationRequest(
                request_id=name, prompt_token_ids=(1,), max_tokens=1, cache_salt="x" * 300_000
            )
            adding = asyncio.create_task(scheduler.add(large))
            await asyncio.sleep(0)
            adding.cancel()
            await scheduler.abort(name)
        assert await actor.all.remote() == [(kind, n) for n in names for kind in ("add", "abort")]

    asyncio.run(scenario())


@ray.remote(num_cpus=0)
class WaitingScheduler:
    """Tells of a fault in a stage that nobody has, and then of nothing."""

    async def next_fault(self):
        return Fault(cause="a stage was lost", broken=frozenset({7}), detect_s=0.0)

    async def send_events(self, address):
        await asyncio.Event().wait()

    async def load(self):
        """Show that it lives."""


def test_when_supervision_breaks_who_waits_for_events_is_told(ray_cluster, tiny_llama):
    async def scenario():
        config = make_service_config(tiny_llama, num_stages=2, cpus_per_stage=0.5)
        group = StageGroup(stages=(), infos=(), num_blocks=1, max_model_len=1, epoch=0)
        actor = WaitingScheduler.remote()
        await actor.__ray_ready__.remote()
        replica = PipelineReplica(config, group, RemoteScheduler(actor), None)
        with pytest.raises(PipelineError, match="internal error: IndexError"):
            await asyncio.wait_for(replica.next_events(), 30)
        await replica.close()

    asyncio.run(scenario())


def test_without_recovery_a_lost_scheduler_breaks_the_replica_and_close_ends_its_stages(
    ray_cluster, tiny_llama
):
    async def scenario():
        others = actor_processes()
        replica = await PipelineReplica.start(without_recovery(tiny_llama, num_stages=1))
        own = actor_processes() - others
        (scheduler,) = own - stage_processes()
        events = asyncio.ensure_future(replica.next_events())
        await replica.check_health()
        os.kill(scheduler, signal.SIGKILL)
        for answer in (events, replica.load()):
            with pytest.raises(PipelineError, match=r"^the scheduler was lost: ") as caught:
                await answer
            assert type(caught.value) is SchedulerLostError
        with pytest.raises(SchedulerLostError):
            await replica.check_health()
        assert own & actor_processes() == own - {scheduler}
        await replica.close()
        await wait_until_gone(own)

    asyncio.run(scenario())


@pytest.fixture
def own_log():
    """The replica's server sends this package's log elsewhere."""
    own = logging.getLogger("gllm_ray")
    before = own.handlers, own.level, own.propagate
    yield
    own.handlers, own.level, own.propagate = before


async def start_server(config):
    """The server of a replica, made as Serve makes it."""
    server = object.__new__(LLMServer.func_or_class)
    await server.__init__(config)
    return server


def with_tokenizer(config, path):
    return config.model_copy(
        update={"model": config.model.model_copy(update={"tokenizer": str(path)})}
    )


def check_startup(replica, stages):
    """The phases of a start follow each other, those of the stages within the replica's."""
    in_order = ["checkpoint", "stages", "kv_cache", "connect", "scheduler"]
    assert list(replica) == ["total", "tokenizer", *in_order]
    assert 0 < replica["tokenizer"] < replica["total"]
    assert sum(replica[phase] for phase in in_order) == pytest.approx(replica["total"], abs=1)
    phases = ["process", "import", "checkpoint", "model", "weights", "conversion", "probe"]
    for stage in stages:
        assert list(stage) == phases
        assert min(stage.values()) > 0
        assert sum(stage.values()) <= replica["stages"]


# Python calls Serve's asynchronous destructor once more.
@pytest.mark.filterwarnings("ignore:coroutine .*__del__")
def test_a_long_repair_is_no_failure_to_serve_and_keeps_new_requests_away(
    ray_cluster, own_log, tiny_llama, monkeypatch
):
    async def scenario():
        config = make_service_config(tiny_llama, cpus_per_stage=0.5)
        server = await start_server(with_tokenizer(config, "package://gllm_ray/demo/model"))
        pipeline = server._pipeline
        await server.check_ready()
        os.kill(await pipeline.group.stages[0].ping.remote(), signal.SIGKILL)
        async with asyncio.timeout(30):
            while pipeline.standstill_s == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await server.check_ready()
            monkeypatch.setattr("gllm_ray.serving.server._MAX_STANDSTILL_S", 0.0)
            await server.check_health()
            with pytest.raises(PipelineError, match="under repair for"):
                await server.check_ready()
            while pipeline.standstill_s > 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await server.check_ready()
        await server.__del__()

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore:coroutine .*__del__")
def test_a_server_that_serve_shuts_down_leaves_no_actor(ray_cluster, own_log, tiny_llama):
    async def scenario():
        others = actor_processes()
        config = make_service_config(tiny_llama, num_stages=2, cpus_per_stage=0.5)
        server = await start_server(with_tokenizer(config, "package://gllm_ray/demo/model"))
        own = actor_processes() - others
        assert len(own) == 3
        info = await server.server_info()
        assert all("node" not in stage for stage in info["stages"])
        check_startup(info["startup_s"], [stage["startup_s"] for stage in info["stages"]])
        assert info["load"]["num_waiting_requests"] == info["load"]["num_waiting_tokens"] == 0
        await server.__del__()
        with pytest.raises(PipelineError, match="shutting down"):
            await server.check_health()
        await wait_until_gone(own)

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore:coroutine .*__del__")
def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_loaded(
    ray_cluster, own_log, tiny_llama
):
    async def scenario():
        others = actor_processes()
        config = make_service_config(tiny_llama, num_stages=2, cpus_per_stage=0.5)
        with pytest.raises(ConfigError, match="tokenizer"):
            await start_server(with_tokenizer(config, tiny_llama))
        await wait_until_gone(actor_processes() - others)

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore:coroutine .*__del__")
def test_an_output_that_a_stop_string_ends_teaches_the_scheduler_its_length(
    ray_cluster, own_log, tmp_path
):
    log = tmp_path / "lengths"

    async def complete(http, **change):
        body = {"model": "demo", "prompt": "def read", "max_tokens": 24, "temperature": 0}
        answer = await http.post("/v1/completions", json=body | {"ignore_eos": True} | change)
        lines = map(json.loads, log.read_text().splitlines())
        return answer.json(), [line["num_output_tokens"] for line in lines]

    async def scenario():
        config = make_service_config("package://gllm_ray/demo/model", cpus_per_stage=0.5)
        parts = [
            (config.model, {"served_name": "demo"}),
            (config.scheduler, {"length_log": str(log)}),
        ]
        model, scheduler = (part.model_copy(update=change) for part, change in parts)
        server = await start_server(
            config.model_copy(update={"model": model, "scheduler": scheduler})
        )
        async with http_client(server) as http:
            answer, lengths = await complete(http)
            assert lengths == [24]
            answer, lengths = await complete(http, stop=[answer["choices"][0]["text"][10:14]])
            num_tokens = answer["usage"]["completion_tokens"]
            assert num_tokens < 24
            assert lengths == [24, num_tokens]
        await server.__del__()

    asyncio.run(scenario())
