"""The Serve deployment: one replica owns one pipeline and answers HTTP for it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.util import get_current_placement_group

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.autoscaling import SignalMeter
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.messages import GenerationRequest, StageInfo, TokenEvent
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.observability import ServiceMetrics, log_with_serve
from gllm_ray.serving.openai_api import build_api
from gllm_ray.stages.timeline import PhaseClock, describe_startup

logger = logging.getLogger(__name__)


@serve.deployment
@serve.ingress()
class LLMServer:
    """Starts a pipeline in the replica's placement group and serves it; a `GenerationService`."""

    async def __init__(self, config: ServiceConfig) -> None:
        log_with_serve()
        self._config = config
        self._meter = SignalMeter()
        total, tokenizer = PhaseClock(), PhaseClock()
        starting = asyncio.create_task(PipelineReplica.start(config, get_current_placement_group()))
        try:
            # First, because it takes seconds where weights may take minutes.
            self.tokenizer = await asyncio.to_thread(Tokenizer.for_model, config.model)
        except BaseException:
            starting.cancel()
            await asyncio.wait([starting])
            raise
        tokenizer.end("tokenizer")
        self._pipeline = await starting
        self.model_name = config.model.name
        self.max_model_len = self._pipeline.group.max_model_len
        self._client = EngineClient(self._pipeline)
        await self._client.start()
        total.end("total")
        group = self._pipeline.group
        self._startup_s = {**total.times_s, **tokenizer.times_s, **group.startup_s}
        logger.info("%s", describe_startup(self._startup_s, group.infos))
        self._metrics = ServiceMetrics(self.model_name)
        self._reporting = asyncio.create_task(self._metrics.report(self._pipeline.load))
        logger.info("ready: model=%s num_stages=%d", self.model_name, config.pipeline.num_stages)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is initialized; the routes then close over it."""
        return build_api(self)

    async def __del__(self) -> None:
        """Called by Serve after the last request; what it finds half started dies with it."""
        if hasattr(self, "_reporting"):
            self._reporting.cancel()
            await self._client.close()
            await self._pipeline.close()

    # A generator itself, so that Serve lets a handle call it.
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request; closing the generator early aborts it. See `EngineClient.generate`."""
        events = self._metrics.observe(request, self._client.generate(request))
        async with aclosing(events) as steps:
            async for step in steps:
                yield step

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        await self._client.check_health()
        await self._pipeline.check_health()

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


def _public(info: StageInfo) -> dict[str, Any]:
    """All but the host, which is not for clients."""
    return {key: value for key, value in asdict(info).items() if key != "node"}
