"""A pipeline for batches on a Ray cluster: the configuration's, in a placement group of its own."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.batch.answers import EngineAnswers
from gllm_ray.bundles import bundles
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import PipelineError
from gllm_ray.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def batch_config(config: ServiceConfig) -> ServiceConfig:
    """A service's configuration for work that nobody waits for.

    The limits of its queue are for clients that come as they like.
    """
    no_limits = {"max_waiting_requests": None, "max_waiting_tokens": None, "queue_timeout_s": None}
    scheduler = config.scheduler.model_copy(update=no_limits)
    return config.model_copy(update={"scheduler": scheduler})


@asynccontextmanager
async def start_pipeline(
    config: ServiceConfig, tokenizer: Tokenizer | None = None
) -> AsyncIterator[EngineAnswers]:
    """Start the pipeline of a service on the cluster that this process is connected to.

    Args:
        config: Of the service.
        tokenizer: The model's; None: it is loaded.

    Raises:
        ConfigError: The model cannot be served as configured.
        PipelineError: The cluster has no room, or a process died.
    """
    group = reserve(config)
    try:
        await wait_for_room(group, config)
        async with run_pipeline(config, group, tokenizer) as answers:
            yield answers
    finally:
        remove_placement_group(group)


def reserve(config: ServiceConfig) -> PlacementGroup:
    """Ask for what a pipeline needs."""
    return placement_group(bundles(config), strategy=config.pipeline.placement_strategy)


@asynccontextmanager
async def run_pipeline(
    config: ServiceConfig,
    group: PlacementGroup,
    tokenizer: Tokenizer | None = None,
    *,
    is_single: bool = False,
) -> AsyncIterator[EngineAnswers]:
    """Start the pipeline of a service in a placement group; see `start_pipeline`.

    For `is_single` see `RequestChecks`.
    """
    config = batch_config(config)
    replica = await PipelineReplica.start(config, group)
    client = EngineClient(replica)
    try:
        await client.start()
        yield EngineAnswers(
            client,
            model_name=config.model.name,
            tokenizer=tokenizer or await asyncio.to_thread(Tokenizer.for_model, config.model),
            max_model_len=replica.group.max_model_len,
            is_single=is_single,
        )
    finally:
        await client.close()
        await replica.close()


async def wait_for_room(group: PlacementGroup, config: ServiceConfig) -> None:
    """Return when a placement group has its resources.

    Raises:
        PipelineError: It did not get them within `recovery.restart_timeout_s`.
    """
    timeout_s = config.recovery.restart_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            await group.ready()
    except TimeoutError:
        raise PipelineError(
            f"the cluster had no room for {group.bundle_specs} for {timeout_s:.0f} s; it has "
            f"{ray.cluster_resources()}, of which {ray.available_resources()} are free"
        ) from None
