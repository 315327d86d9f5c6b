"""What holds after every fault, and a replica for the tests that leave it repaired."""

import asyncio
import logging

import pytest

from tests.faults.api import serving
from tests.faults.replicas import (
    HEARTBEAT_TIMEOUT_S,
    NUM_STAGES,
    check_nothing_is_left_behind,
    make_config,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What `make test` runs with one control plane alone, `make chaos` runs with the other."""
    for item in items:
        mark = item.get_closest_marker("short_with")
        if mark is not None and item.callspec.params["control_plane"] not in mark.args:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Whatever a test broke, no actor and no placement group outlives the replica it was of."""
    yield
    check_nothing_is_left_behind()


@pytest.fixture(autouse=True)
def info_log(caplog):
    caplog.set_level(logging.INFO, "gllm_ray")


@pytest.fixture(scope="package")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="package", params=["refs", "direct"])
def control_plane(request):
    """How micro-batches reach the stages."""
    return request.param


@pytest.fixture(scope="package")
def api(ray_cluster, loop, control_plane):
    """A replica, and a client of its routes."""
    config = make_config(
        NUM_STAGES,
        control_plane=control_plane,
        calm_s=0.01,
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
    )
    context = serving(config)
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="package")
def pipeline(api):
    """The replica alone."""
    service, _ = api
    return service
