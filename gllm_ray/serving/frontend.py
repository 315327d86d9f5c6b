"""The Serve deployment of the routes alone, before the deployments of one model or several.

Text stays on this side: prompts become tokens here and tokens text. Tokens are all that a replica
needs to take a request over, and the detokenizer, which may hold half of a character or of a stop
string back, goes on as if nothing had happened.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from gllm_ray.config import FrontEndConfig, ModelsConfig, ServiceConfig
from gllm_ray.engine.resumption import ResumingClient
from gllm_ray.errors import OverloadedError, PipelineError
from gllm_ray.messages import GenerationRequest, TokenEvent
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.api_keys import read_api_keys
from gllm_ray.serving.observability import ServiceMetrics, log_with_serve
from gllm_ray.serving.openai_api import build_api
from gllm_ray.serving.replica_counts import ReplicaCounts
from gllm_ray.stages.ray_errors import translate_ray_error

logger = logging.getLogger(__name__)


class PipelineHandle:
    """The replicas of a `PipelineServer`, with our errors for those of Ray; a `ReplicaSet`.

    Serve chooses the replica, and holds the request while there is none.

    Args:
        handle: Of their deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(stream=True).generate
        self._caller = ray.get_runtime_context().current_actor
        self._numbers = itertools.count()

    async def run(
        self, request: GenerationRequest, output_token_ids: tuple[int, ...] | None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request on one of them; see `ReplicaSet.run`."""
        request_id = request.request_id
        # A replica that could not be reached for a while may still have the request.
        renamed = replace(request, request_id=f"{request_id}/{next(self._numbers)}")
        answer = self._generate.remote(renamed, output_token_ids, self._caller)
        has_ended = False
        try:
            async for step in answer:
                events = [TokenEvent(request_id, *fields) for fields in step]
                has_ended = bool(events) and events[-1].finish_reason is not None
                yield events
        except BackPressureError as error:
            retry_after_s = error.retry_after_s or 1.0
            raise OverloadedError(f"the service is full: {error}", retry_after_s) from error
        except RayServeException as error:
            raise PipelineError(f"no replica took the request: {error}") from error
        except RayError as error:
            raise translate_ray_error(error, "a replica", lost=PipelineError) from error
        finally:
            if not has_ended:
                answer.cancel()


class RemoteModel:
    """The pipelines of one model, in another deployment; a `GenerationService`.

    Args:
        config: Of the model.
        handle: Of its deployment.
        frontend: How long requests go on.
        tokenizer: The model's.
        counts: Of the application's replicas.
    """

    def __init__(
        self,
        config: ServiceConfig,
        handle: DeploymentHandle,
        frontend: FrontEndConfig,
        tokenizer: Tokenizer,
        counts: ReplicaCounts,
    ) -> None:
        self.model_name = config.model.name
        self.max_model_len = open_checkpoint(config.model).max_model_len
        self.tokenizer = tokenizer
        self.metrics = ServiceMetrics(self.model_name)
        self._config = config
        self._handle = handle
        self._counts = counts
        self._client = ResumingClient(
            PipelineHandle(handle), frontend, self.metrics.count_resumption
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request; closing the generator early aborts it."""
        return self.metrics.observe(request, self._client.generate(request))

    async def check_ready(self) -> None:
        """Return if a replica runs, or may come when there is a request.

        Raises:
            PipelineError: There is none.
        """
        num_running = await self._counts.of(self._handle.deployment_name)
        if not num_running and self._config.deployment.min_replicas:
            raise PipelineError(
                f"no replica of {self.model_name} runs",
                public_message="no replica of the model runs; send the request later",
            )

    async def server_info(self) -> dict[str, Any]:
        """What one of the replicas tells, if any runs; asking would start the first."""
        num_running = await self._counts.of(self._handle.deployment_name)
        info = {"model": self.model_name, "max_model_len": self.max_model_len}
        if num_running:
            info = await self._handle.server_info.remote()
        return {**info, "num_replicas": num_running}


def _ask_controller() -> dict[str, int]:
    """The running replicas of each deployment of this application."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: deployment.replica_states.get("RUNNING", 0)
        for name, deployment in application.deployments.items()
    }


@serve.deployment
@serve.ingress()
class FrontEnd:
    """Answers HTTP for the pipelines of other deployments."""

    async def __init__(self, config: ModelsConfig, *handles: DeploymentHandle) -> None:
        log_with_serve()
        self._api_keys = read_api_keys(config.frontend.api_key_env)
        self._config = config.frontend
        # In turn: of threads that import transformers together, one may find it half done.
        tokenizers = [
            await asyncio.to_thread(Tokenizer.for_model, model.model) for model in config.models
        ]
        counts = ReplicaCounts(_ask_controller)
        self._models = [
            RemoteModel(model, handle, config.frontend, tokenizer, counts)
            for model, handle, tokenizer in zip(config.models, handles, tokenizers, strict=True)
        ]
        self._reporting = [asyncio.create_task(model.metrics.report()) for model in self._models]
        logger.info("ready: models=%s", [model.model_name for model in self._models])

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is initialized; the routes then close over it."""
        return build_api(
            *self._models,
            api_keys=self._api_keys,
            allowed_origins=self._config.allowed_origins,
            stream_keep_alive_s=self._config.stream_keep_alive_s,
        )
