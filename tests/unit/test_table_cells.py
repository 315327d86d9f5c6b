from gllm_ray.bench.request_figures import summarize
from gllm_ray.bench.table_cells import quantiles


def as_cells(values):
    summary = summarize(values)
    return quantiles({name: getattr(summary, name) for name in ("mean", "p50", "p90", "p99")})


def test_a_latency_that_no_request_has_is_a_dash_and_not_zero():
    assert as_cells([]) == "-"
    assert as_cells([0.2, 0.2]) == "200 / 200 / 200"
