"""Hosts: what the process beside an accelerator costs a stage."""

from collections.abc import Mapping
from functools import cache

from pydantic import Field

from gllm_ray.simulation.calibrations import Calibration, find_calibration, read_calibrations


class Host(Calibration):
    """The serving process of a stage."""

    layer_launch_s: float = Field(
        ge=0,
        description="Launching a layer's kernels: a stage is never faster than that of all its "
        "layers. Close to 0 where the step is replayed as a graph.",
    )
    step_s: float = Field(ge=0, description="A micro-batch, in which the device idles.")
    sequence_s: float = Field(ge=0, description="A sequence of it, in which the device idles.")


@cache
def known_hosts() -> Mapping[str, Host]:
    """The hosts that come with the package."""
    return read_calibrations("hosts.json", Host)


def find_host(name: str) -> Host:
    """A host that comes with the package.

    Raises:
        ConfigError: There is no host of this name.
    """
    return find_calibration("host", name, known_hosts())
