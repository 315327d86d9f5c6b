"""The report of a run: its numbers, its JSON, its table."""

import json

import pytest

from gllm_ray.simulation.metrics import (
    BatchMetrics,
    IdleCause,
    PipelineMetrics,
    RequestMetrics,
    Slo,
)
from gllm_ray.simulation.report import make_report
from gllm_ray.simulation.report_table import format_report
from tests.unit.simulation.runs import small_run

SLO = Slo(ttft_s=1.0, e2e_s=2.0)
GOLDEN = {
    "schema_version": 1,
    "wall_s": 10.0,
    "num_ended": {"stop": 2, "length": 1, "abort": 0, "error": 0, "blamed": 0, "expired": 1},
    "num_input_tokens": 300,
    "num_output_tokens": 9,
    "requests_per_s": 0.3,
    "input_tokens_per_s": 30.0,
    "output_tokens_per_s": 0.9,
    "slo": {"ttft_s": 1.0, "tpot_s": None, "e2e_s": 2.0},
    "goodput_per_s": 0.2,
    "goodput_ratio": 0.5,
    "ttft_s": {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0},
    "tpot_s": {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5},
    "itl_s": {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5},
    "e2e_s": {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98},
    "queue_s": {"mean": 0.25, "p50": 0.25, "p90": 0.25, "p99": 0.25},
    "num_preemptions": 3,
    "num_micro_batches": 4,
    "batch_tokens": {"mean": 8.0, "p50": 8.0, "p90": 12.0, "p99": 12.0},
    "batch_decodes": {"mean": 3.0, "p50": 3.0, "p90": 4.0, "p99": 4.0},
    "pipeline": {
        "utilization": 0.625,
        "bubble_ratio": {"no_work": 0.1875, "upstream": 0.1875, "scheduler": 0.0, "repair": 0.0},
    },
    "stages": [
        {
            "utilization": 0.5,
            "bubble_ratio": {"no_work": 0.25, "upstream": 0.25, "scheduler": 0.0, "repair": 0.0},
        },
        {
            "utilization": 0.75,
            "bubble_ratio": {"no_work": 0.125, "upstream": 0.125, "scheduler": 0.0, "repair": 0.0},
        },
    ],
    "kv_utilization_mean": 0.125,
    "kv_utilization_peak": 0.75,
    "ideal_ratio": 0.5,
    "prefix_hit_ratio": 0.25,
    "replicas": {"mean": 1.5, "min": 1, "max": 2, "changes": [[0.0, 1], [5.0, 2]]},
    "nominal_constants": [],
}
TABLE = """\
simulated time   10.000 s
requests         3 finished (2 stop, 1 length), 1 expired
throughput       0.300 requests/s, 30.0 input and 0.9 output tokens/s
goodput          0.200 requests/s, 50.0% of all (TTFT <= 1 s, E2E <= 2 s)
KV cache in use  12.5% on average, 75.0% at most
prefix caches    25.0% of the prompt tokens found
preemptions      3
micro-batches    4
of the ideal     50.0% (stages never idle, micro-batches of the best size)
replicas         1.5 on average, 1 to 2: 1 from 0 s, 2 from 5 s

                            mean     p50     p90     p99
TTFT (ms)                 1000.0  1000.0  1000.0  1000.0
TPOT (ms)                  500.0   500.0   500.0   500.0
ITL (ms)                   500.0   500.0   500.0   500.0
E2E (ms)                  2000.0  2000.0  2800.0  2980.0
queue time (ms)            250.0   250.0   250.0   250.0
tokens of a micro-batch      8.0     8.0    12.0    12.0
decodes of a micro-batch     3.0     3.0     4.0     4.0

             busy  idle: no work  idle: upstream  idle: scheduler
stage 0     50.0%          25.0%           25.0%             0.0%
stage 1     75.0%          12.5%           12.5%             0.0%
all stages  62.5%          18.8%           18.8%             0.0%"""


def rounded(value):
    """JSON with floats rounded to 9 places, and keys as they come."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


def test_the_json_of_a_run_is_golden_down_to_the_order_of_its_keys():
    assert json.dumps(rounded(small_run(SLO).to_json())) == json.dumps(GOLDEN)


def test_the_table_of_a_run_is_golden():
    assert format_report(small_run(SLO)) == TABLE


def test_what_nobody_asked_for_is_not_in_the_table():
    text = format_report(
        make_report(RequestMetrics(), BatchMetrics(), [PipelineMetrics(1)], wall_s=1.0)
    )
    assert "goodput" not in text
    assert "ideal" not in text
    assert "prefix" not in text
    assert "replicas" not in text
    assert "repair" not in text
    assert "requests         none" in text


def test_replicas_that_change_often_are_counted_alone():
    counts = [(0.1 * index, 1 + index % 3) for index in range(60)]
    report = make_report(
        RequestMetrics(), BatchMetrics(), [PipelineMetrics(1)], wall_s=6.0, replica_counts=counts
    )
    assert "replicas         2.0 on average, 1 to 3, 59 changes\n" in format_report(report)


def test_the_table_tells_of_repairs():
    repaired = PipelineMetrics(1)
    repaired.stages[0].idle_s[IdleCause.REPAIR] = 0.5
    repaired.stages[0].busy_s = 0.5
    report = make_report(RequestMetrics(), BatchMetrics(), [repaired], wall_s=1.0)
    assert "idle: repair" in format_report(report)


def test_the_shares_of_a_stage_add_up_to_1():
    for stage in small_run().stages:
        assert stage.utilization + sum(stage.bubble_ratio.values()) == pytest.approx(1)


def test_a_replica_that_ran_longer_weighs_more():
    short, long = PipelineMetrics(1), PipelineMetrics(1)
    short.stages[0].busy_s = 1.0
    long.stages[0].idle_s[IdleCause.SCHEDULER] = 3.0
    report = make_report(RequestMetrics(), BatchMetrics(), [short, long], wall_s=4.0)
    assert report.stages[0].utilization == 0.25
    assert report.pipeline.bubble_ratio[IdleCause.SCHEDULER] == 0.75


def test_a_run_in_which_nothing_happened_is_all_0():
    report = make_report(RequestMetrics(), BatchMetrics(), [], wall_s=1.0)
    assert (report.requests_per_s, report.goodput_ratio, report.kv_utilization_mean) == (0, 0, 0)
    assert (report.stages, report.ttft_s.p99, report.pipeline.utilization) == ((), 0, 0)


def test_a_run_without_time_is_refused():
    with pytest.raises(ValueError, match="wall_s=0: must be > 0"):
        make_report(RequestMetrics(), BatchMetrics(), [], wall_s=0)
