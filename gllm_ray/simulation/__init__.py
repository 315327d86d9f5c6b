"""The serving scheduler in virtual time: models, devices, links, workloads, and their report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gllm_ray.simulation.run import simulate

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whoever needs one module does not load them all
    if name != "simulate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gllm_ray.simulation.run import simulate

    return simulate
