"""The trace that Perfetto and Chrome read."""

import io
import json

from gllm_ray.simulation.chrome_trace import write_chrome_trace
from tests.unit.simulation.runs import INTERVALS


def trace_of(intervals):
    file = io.StringIO()
    write_chrome_trace(iter(intervals), file)
    return json.loads(file.getvalue())["traceEvents"]


def test_every_interval_is_a_complete_event_in_microseconds():
    events = [event for event in trace_of(INTERVALS) if event["ph"] == "X"]
    assert events[1] == {
        "ph": "X",
        "pid": 0,
        "tid": 1,
        "ts": 1e6,
        "dur": 1e6,
        "name": "12 tokens",
        "args": {"batch_id": 0},
    }
    assert [(event["pid"], event["tid"], event["name"]) for event in events] == [
        (0, 0, "12 tokens"),
        (0, 1, "12 tokens"),
        (0, 0, "micro-batch 1"),
        (1, 0, "4 tokens"),
    ]


def test_every_stage_is_named_once():
    names = [event for event in trace_of(INTERVALS) if event["name"] == "thread_name"]
    assert [(event["pid"], event["tid"], event["args"]["name"]) for event in names] == [
        (0, 0, "stage 0"),
        (0, 1, "stage 1"),
        (1, 0, "stage 0"),
    ]


def test_an_empty_run_is_an_empty_trace():
    assert trace_of([]) == []
