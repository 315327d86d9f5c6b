"""One load on one service, and what the machine did meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gllm_ray.bench.conditions import Conditions, CpuClock, watch_conditions
from gllm_ray.bench.load_generator import Send, send_load
from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.request_load import RequestLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRun:
    """What one load came to.

    Attributes:
        figures: What clients saw.
        conditions: Load average, and the CPU seconds of the service and of its clients.
    """

    figures: RequestFigures
    conditions: Conditions

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return asdict(self)


async def run_requests(
    send: Send,
    requests: Sequence[LoadRequest],
    load: RequestLoad,
    clocks: Mapping[str, CpuClock],
) -> RequestRun:
    """Send requests once, and watch."""
    with watch_conditions(clocks) as conditions:
        seen = await send_load(send, requests, max_concurrency=load.max_concurrency)
    return RequestRun(figures=RequestFigures.of(seen, load.slo), conditions=conditions)
