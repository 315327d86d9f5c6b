"""The Serve deployments of which each replica owns one pipeline.

`LLMServer` answers HTTP for it; `PipelineServer` runs what front ends send.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.actor import ActorHandle
from ray.util import get_current_placement_group

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.autoscaling import SignalMeter
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.engine.completion import passing_on
from gllm_ray.errors import PipelineError
from gllm_ray.garbage import no_garbage_collection, relax_garbage_collector
from gllm_ray.messages import GenerationRequest, StageInfo, TokenEvent
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.api_keys import read_api_keys
from gllm_ray.serving.callers import CallerWatch
from gllm_ray.serving.observability import ServiceMetrics, log_with_serve
from gllm_ray.serving.openai_api import build_api
from gllm_ray.stages.timeline import PhaseClock, describe_startup

logger = logging.getLogger(__name__)

# Longer than a repair takes that finds a place for its stages and their weights at hand.
_MAX_STANDSTILL_S = 30.0


class PipelineOwner:
    """Starts a pipeline in the replica's placement group, and tells Serve how it is."""

    async def __init__(self, config: ServiceConfig) -> None:
        log_with_serve()
        self._config = config
        self._meter = SignalMeter()
        total = PhaseClock()
        with no_garbage_collection():
            prepared_s = await self._start()
        relax_garbage_collector()
        self.model_name = config.model.name
        self.max_model_len = self._pipeline.group.max_model_len
        self._client = EngineClient(self._pipeline)
        await self._client.start()
        total.end("total")
        group = self._pipeline.group
        self._startup_s = {**total.times_s, **prepared_s, **group.startup_s}
        logger.info("%s", describe_startup(self._startup_s, group.infos))
        self._metrics = ServiceMetrics(self.model_name)
        self._reporting = asyncio.create_task(self._metrics.report(self._pipeline))
        logger.info("ready: model=%s num_stages=%d", self.model_name, config.pipeline.num_stages)

    async def _start(self) -> dict[str, float]:
        """Start the pipeline, and prepare meanwhile; returns how long each phase of that took."""
        group = get_current_placement_group()
        starting = asyncio.create_task(PipelineReplica.start(self._config, group))
        try:
            prepared_s = await self._prepare()
        except BaseException:
            starting.cancel()
            await asyncio.wait([starting])
            raise
        self._pipeline = await starting
        return prepared_s

    async def _prepare(self) -> dict[str, float]:
        """Do what need not wait for the pipeline; returns how long each phase took."""
        return {}

    async def __del__(self) -> None:
        """Called by Serve after the last request; what it finds half started dies with it."""
        if hasattr(self, "_reporting"):
            self._reporting.cancel()
            await self._client.close()
            await self._pipeline.close()

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        await self._client.check_health()
        await self._pipeline.check_health()

    async def check_ready(self) -> None:
        """See `GenerationService`; unlike Serve, who asks here may send requests elsewhere.

        Raises:
            PipelineError: The pipeline is broken, or has been under repair for long.
        """
        await self.check_health()
        if (standstill_s := self._pipeline.standstill_s) > _MAX_STANDSTILL_S:
            raise PipelineError(
                f"the pipeline has been under repair for {standstill_s:.0f} s",
                public_message="the pipeline is being repaired; send the request later",
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which tells the `SignalPolicy` their mean."""
        signals = self._meter.read(await self._pipeline.load(), time.monotonic())
        return asdict(signals)

    async def server_info(self) -> dict[str, Any]:
        """What this replica serves, on which stages, how long it took to start, and its load.

        Of `startup_s`, `tokenizer` ran beside the phases that follow it, and `total` covers all.
        """
        group = self._pipeline.group
        return {
            "model": self.model_name,
            "max_model_len": self.max_model_len,
            "block_size": self._config.kv_cache.block_size,
            "num_blocks": group.num_blocks,
            "startup_s": self._startup_s,
            "stages": [_public(info) for info in group.infos],
            "load": asdict(await self._pipeline.load()),
        }


@serve.deployment
@serve.ingress()
class LLMServer(PipelineOwner):
    """Answers HTTP for its pipeline; a `GenerationService`."""

    async def _prepare(self) -> dict[str, float]:
        clock = PhaseClock()
        self._api_keys = read_api_keys(self._config.deployment.api_key_env)
        # Beside the stages, because it takes seconds where weights may take minutes.
        self.tokenizer = await asyncio.to_thread(Tokenizer.for_model, self._config.model)
        clock.end("tokenizer")
        return dict(clock.times_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is initialized; the routes then close over it."""
        return build_api(
            self,
            api_keys=self._api_keys,
            allowed_origins=self._config.deployment.allowed_origins,
            stream_keep_alive_s=self._config.deployment.stream_keep_alive_s,
        )

    # A generator itself, so that Serve lets a handle call it.
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request; closing the generator early aborts it. See `EngineClient.generate`."""
        events = self._metrics.observe(request, self._client.generate(request))
        async with passing_on(events) as steps:
            async for step in steps:
                yield step


@serve.deployment
class PipelineServer(PipelineOwner):
    """Runs what front ends send; they measure the requests, which may outlive this replica."""

    async def _prepare(self) -> dict[str, float]:
        self._callers = CallerWatch(lambda request_id: self._client.abort(request_id))
        return {}

    async def generate(
        self,
        request: GenerationRequest,
        output_token_ids: tuple[int, ...] | None,
        caller: ActorHandle,
    ) -> AsyncGenerator[list[list[object]], None]:
        """Run a request; cancelling the call aborts it. See `EngineClient.generate`.

        Args:
            request: Under an id that no other call has.
            output_token_ids: See `EngineClient.generate`.
            caller: The request is aborted if this actor dies.

        Yields:
            First an empty list, once the request is accepted; then for each event the fields after
            its `request_id`, in lists: Ray pickles tuples, twenty times as slowly.
        """
        events = self._client.generate(request, output_token_ids, tells_acceptance=True)
        with self._callers.note(caller, request.request_id):
            async with aclosing(events) as steps:
                async for step in steps:
                    yield [[*event[1:]] for event in step]


def _public(info: StageInfo) -> dict[str, Any]:
    """All but the host, which is not for clients."""
    return {key: value for key, value in asdict(info).items() if key != "node"}
