"""The trace that Perfetto and Chrome read."""

import io
import json

from gllm_ray.simulation.chrome_trace import HopInterval, write_chrome_trace
from tests.unit.simulation.runs import INTERVALS


def trace_of(intervals, hops=()):
    file = io.StringIO()
    write_chrome_trace(iter(intervals), file, hops=hops)
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


def test_hops_that_overlap_keep_their_beginning_and_end():
    hops = [HopInterval(0, 7, 1.0, 1.5), HopInterval(0, 8, 1.25, 2.0), HopInterval(1, 7, 1.5, 3.0)]
    events = [event for event in trace_of(INTERVALS, hops) if event["ph"] in "be"]
    assert [(event["ph"], event["id"], event["ts"], event["name"]) for event in events] == [
        ("b", "0.7", 1e6, "hop to stage 1"),
        ("e", "0.7", 1.5e6, "hop to stage 1"),
        ("b", "0.8", 1.25e6, "hop to stage 1"),
        ("e", "0.8", 2e6, "hop to stage 1"),
        ("b", "1.7", 1.5e6, "hop to stage 2"),
        ("e", "1.7", 3e6, "hop to stage 2"),
    ]
