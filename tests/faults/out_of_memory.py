"""A stage takes more memory than the node may use, and Ray kills it.

Prints what came of it. A process of its own, because it needs a Ray that watches its memory.
"""

import asyncio
import json
import logging
import os
import sys

import psutil

from tests.faults.api import serving
from tests.faults.moments import complete_all, reach
from tests.faults.replicas import check_nothing_is_left_behind, make_config
from tests.local_ray import local_ray

MOMENT = "streaming"
LIMIT_BYTES, HOARD_BYTES = 2 * 2**30, 4 * 2**30  # beyond what is in use now


def hoard(stage_actor) -> None:
    """Take memory, page by page, until somebody ends it."""
    stage_actor.hoard = bytearray(os.urandom(4096)) * (HOARD_BYTES // 4096)


async def scenario(control_plane: str) -> dict:
    config = make_config(2, control_plane=control_plane, calm_s=0.01)
    async with serving(config) as (service, http):
        before = await service.pids()
        answers = asyncio.create_task(complete_all(http, MOMENT))
        await reach(http, MOMENT)
        hoarder = service.replica.group.stages[1]
        hoarder.__ray_call__.options(concurrency_group="ctl").remote(hoard)
        answers = await answers
        load = await service.replica.load()
        after = await service.pids()
        return {
            "answers": answers,
            "expected": await complete_all(http, MOMENT),
            "open": [load.num_requests, load.kv_utilization],
            "is_replaced": [one != other for one, other in zip(before, after, strict=True)],
        }


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    memory = psutil.virtual_memory()
    in_use = 1 - memory.available / memory.total
    os.environ |= {
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": str(in_use + LIMIT_BYTES / memory.total),
    }
    with local_ray(num_cpus=4):
        outcome = asyncio.run(scenario(sys.argv[1]))
        check_nothing_is_left_behind()
        print(json.dumps(outcome))  # noqa: T201


if __name__ == "__main__":
    main()
