import functools

import pytest

from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.models import SmallModel, make_small_model
from tests.numerics.serving import service_config


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The checkpoint of an architecture, made once."""

    @functools.cache
    def make(name: str) -> SmallModel:
        return make_small_model(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(params=[False, True], ids=["", "ring"])
def ring(request):
    """Whether decodes are submitted before the scheduler knows their tokens."""
    return request.param


@pytest.fixture(scope="session")
def local_pipeline(small_model):
    """A started pipeline of an architecture, made once for each number of stages."""

    @functools.cache
    def start(name: str, num_stages: int) -> LocalPipeline:
        path = small_model(name).path
        return LocalPipeline.start(service_config(path, num_stages=num_stages))

    return start
