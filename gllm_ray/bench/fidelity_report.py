"""What the engine and the simulator gave for the same requests, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

from gllm_ray.bench.service_costs import ServiceCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is compared; requests all have the same lengths, so their rate is the throughput."""

    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureError:
    """A figure of the engine and of the simulator.

    Attributes:
        name: That of the figure.
        measured: Its mean over the repeats on the engine.
        simulated: Its mean over those in the simulator.
        error: What the simulator is off, as a share of what was measured.
        noise: What the repeats on the engine are apart, as such a share. A smaller error
            cannot be told from it.
    """

    name: str
    measured: float
    simulated: float
    error: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One load on the engine and in the simulator.

    Attributes:
        load: Its name.
        rate_per_s: Requests a second; None: all at once.
        measured: What clients of the engine saw in each repeat of the same requests.
        simulated: What those of the simulator saw, with another jitter each time.
        stage_slowdown: The time of the stages for what they computed in these repeats, over that
            for the same in the calibration: how much the machine itself has changed. Not an input
            of the simulation.
    """

    load: str
    rate_per_s: float | None
    measured: tuple[Figures, ...]
    simulated: tuple[Figures, ...]
    stage_slowdown: float

    @property
    def errors(self) -> list[FigureError]:
        """Of each figure."""
        return [_compare(field.name, self.measured, self.simulated) for field in fields(Figures)]


def _compare(name: str, measured: Sequence[Figures], simulated: Sequence[Figures]) -> FigureError:
    engine = [getattr(figures, name) for figures in measured]
    mean, simulator = fmean(engine), fmean(getattr(figures, name) for figures in simulated)
    return FigureError(
        name=name,
        measured=mean,
        simulated=simulator,
        error=simulator / mean - 1,
        noise=(max(engine) - min(engine)) / mean,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityResult:
    """The comparisons of one model.

    Attributes:
        provenance: Model, hardware, versions.
        costs: What a micro-batch costs beside the computing of its stages.
        client_s: How much longer clients wait for a first token than the scheduler takes.
        comparisons: By load; the first one is saturated.
    """

    provenance: str
    costs: ServiceCosts
    client_s: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        comparisons = [
            asdict(each) | {"errors": [asdict(error) for error in each.errors]}
            for each in self.comparisons
        ]
        return asdict(self) | {"comparisons": comparisons}

    def table(self) -> str:
        """A line for each load and figure, and one for what the machine changed."""
        lines = [
            f"{'load':<13}{'figure':<16}{'engine':>9}{'simulator':>11}{'error':>8}{'noise':>8}"
        ]
        for each in self.comparisons:
            for line in each.errors:
                numbers = f"{line.measured:>9.4g}{line.simulated:>11.4g}"
                shares = f"{line.error:>+8.1%}{line.noise:>8.1%}"
                lines.append(f"{each.load:<13}{line.name:<16}{numbers}{shares}")
            slowdown = f"{each.stage_slowdown - 1:>+8.1%}"
            lines.append(f"{each.load:<13}{'stages slower than when calibrated':<36}{slowdown}")
        return "\n".join(lines)
