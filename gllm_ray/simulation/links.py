"""Links between accelerators: the time of a transfer, and of an all-reduce."""

from collections.abc import Mapping
from functools import cache

from pydantic import Field

from gllm_ray.simulation.calibrations import Calibration, find_calibration, read_calibrations
from gllm_ray.strict_schema import StrictModel


class AllReduceFit(StrictModel):
    """All-reduces of a number of ranks, measured."""

    num_ranks: int = Field(ge=2, description="Devices that take part.")
    latency_s: float = Field(ge=0, description="An all-reduce of no bytes.")
    bandwidth_bytes_s: float = Field(gt=0, description="Bytes reduced a second on top.")


class Link(Calibration):
    """What connects devices with each other."""

    latency_s: float = Field(ge=0, description="A transfer of no bytes.")
    bandwidth_bytes_s: float = Field(gt=0, description="Bytes transferred a second on top.")
    all_reduces: list[AllReduceFit] = Field(
        default=[], description="All-reduces that were measured; others are estimated as rings."
    )

    def transfer_time_s(self, num_bytes: int) -> float:
        """The time from one device to another."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_s

    def all_reduce_time_s(self, num_bytes: int, num_ranks: int) -> float:
        """The time until each of the ranks holds the sum of all, each giving `num_bytes`.

        Where it was not measured it is that of a ring: `2 (n - 1)` transfers of an n-th.
        """
        if num_ranks == 1:
            return 0.0
        for fit in self.all_reduces:
            if fit.num_ranks == num_ranks:
                return fit.latency_s + num_bytes / fit.bandwidth_bytes_s
        return 2 * (num_ranks - 1) * self.transfer_time_s(num_bytes // num_ranks)


@cache
def known_links() -> Mapping[str, Link]:
    """The links that come with the package."""
    return read_calibrations("links.json", Link)


def find_link(name: str) -> Link:
    """A link that comes with the package.

    Raises:
        ConfigError: There is no link of this name.
    """
    return find_calibration("link", name, known_links())
