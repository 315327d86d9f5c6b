"""Writes what the stages did for a trace viewer: Perfetto, or Chrome's."""

import json
from collections.abc import Iterable
from typing import Any, TextIO

from gllm_ray.simulation.metrics import StageInterval


def write_chrome_trace(intervals: Iterable[StageInterval], file: TextIO) -> None:
    """Write intervals as they come, a process for each replica and a thread for each stage.

    Source: Google, "Trace Event Format", JSON object format, complete (X) and metadata (M) events.
    """
    file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    seen: set[tuple[int, int]] = set()
    separator = ""
    for interval in intervals:
        events = [_complete_event(interval)]
        if (place := (interval.replica_id, interval.stage_id)) not in seen:
            seen.add(place)
            events[:0] = _names(*place)
        for event in events:
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
    file.write("\n]}\n")


def _complete_event(interval: StageInterval) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": interval.replica_id,
        "tid": interval.stage_id,
        "ts": round(interval.start_s * 1e6, 3),  # microseconds
        "dur": round((interval.end_s - interval.start_s) * 1e6, 3),
        "name": interval.label or f"micro-batch {interval.batch_id}",
        "args": {"batch_id": interval.batch_id},
    }


def _names(replica_id: int, stage_id: int) -> list[dict[str, Any]]:
    place = {"ph": "M", "pid": replica_id, "tid": stage_id}
    return [
        place | {"name": "process_name", "args": {"name": f"replica {replica_id}"}},
        place | {"name": "thread_name", "args": {"name": f"stage {stage_id}"}},
        place | {"name": "thread_sort_index", "args": {"sort_index": stage_id}},
    ]
