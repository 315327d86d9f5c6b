"""The routes that tell of the service itself, for load balancers, probes and people."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gllm_ray import __version__
from gllm_ray.errors import PipelineError
from gllm_ray.serving.observability import METRIC_PREFIX
from gllm_ray.serving.services import Services

# What load balancers and probes ask, which know no API key.
OPEN_PATHS = ("/health", "/ping")

router = APIRouter()


@router.head("/ping", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/ping")
@router.get("/health")
async def health(services: Services) -> Response:
    """Whether requests can be served, of one model at least."""
    errors = []
    for service in services.values():
        try:
            await service.check_ready()
        except PipelineError as error:
            errors.append(error)
    if len(errors) == len(services):
        raise errors[0]
    return JSONResponse({"status": "ok"})


@router.get("/server_info")
async def server_info(services: Services) -> Response:
    """What is served, on which stages, and how busy it is; of several models, a list of it."""
    infos = [await service.server_info() for service in services.values()]
    return JSONResponse(infos[0] if len(infos) == 1 else {"models": infos})


@router.get("/version")
async def version() -> Response:
    """The version of this package."""
    return JSONResponse({"version": __version__})


# Whoever asks reaches one replica, another each time, and numbers of one would be taken for those
# of the service.
@router.get("/metrics", include_in_schema=False)
async def metrics() -> Response:
    """Where the metrics are.

    Raises:
        HTTPException: Always.
    """
    raise HTTPException(
        404,
        "no metrics here, where one of several replicas answers; scrape Ray's agent of each node, "
        "at the port of `ray start --metrics-export-port`, where they are "
        f"ray_{METRIC_PREFIX}*{{model_name, deployment, replica}}",
    )
