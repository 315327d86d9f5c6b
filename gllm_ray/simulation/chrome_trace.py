"""Writes what the stages did for a trace viewer: Perfetto, or Chrome's."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

from gllm_ray.simulation.metrics import StageInterval


class HopInterval(NamedTuple):
    """When a micro-batch was between a stage and the next one.

    Attributes:
        stage_id: The stage that it left.
        batch_id: The micro-batch.
        start_s: When that stage had computed it, seconds of the trace.
        end_s: When the next stage began with it, which may have had to finish another before.
    """

    stage_id: int
    batch_id: int
    start_s: float
    end_s: float


def write_chrome_trace(
    intervals: Iterable[StageInterval], file: TextIO, *, hops: Iterable[HopInterval] = ()
) -> None:
    """Write intervals as they come, a process for each replica and a thread for each stage.

    Hops, which may overlap each other, have a track of their own for each pair of stages of
    replica 0.

    Source: Google, "Trace Event Format", JSON object format, complete (X), metadata (M) and
    nestable asynchronous (b, e) events.
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
    for hop in hops:
        for event in _hop_events(hop):
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


def _hop_events(hop: HopInterval) -> list[dict[str, Any]]:
    event = {
        "pid": 0,
        "tid": hop.stage_id,
        "cat": "hop",
        "id": f"{hop.stage_id}.{hop.batch_id}",
        "name": f"hop to stage {hop.stage_id + 1}",
        "args": {"batch_id": hop.batch_id},
    }
    moments_s = {"b": hop.start_s, "e": hop.end_s}
    return [
        {"ph": phase, "ts": round(time_s * 1e6, 3), **event} for phase, time_s in moments_s.items()
    ]


def _names(replica_id: int, stage_id: int) -> list[dict[str, Any]]:
    place = {"ph": "M", "pid": replica_id, "tid": stage_id}
    return [
        place | {"name": "process_name", "args": {"name": f"replica {replica_id}"}},
        place | {"name": "thread_name", "args": {"name": f"stage {stage_id}"}},
        place | {"name": "thread_sort_index", "args": {"sort_index": stage_id}},
    ]
