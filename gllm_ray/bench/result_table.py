"""Results of benchmarks as Markdown, on the terminal and in `results/README.md`."""

from collections.abc import Callable, Sequence
from itertools import groupby

from gllm_ray.bench.comparison_table import comparisons
from gllm_ray.bench.markdown import markdown_table
from gllm_ray.bench.result_file import Result
from gllm_ray.bench.table_cells import (
    LATENCIES,
    NONE,
    cpu_text,
    load_averages,
    load_text,
    milliseconds,
    quantiles,
    size_text,
)

_REQUEST_BENCHMARKS = ("serve", "engine", "offline")
_BARE_KEYS = ("wall_s", "cpu_s")
_FRONT_PARTS = ("proxy", "replica", "scheduler", "stages")


def result_tables(results: Sequence[Result], latencies: Sequence[str] = tuple(LATENCIES)) -> str:
    """A table for each kind of benchmark, and what they were measured on.

    Args:
        results: As `make_result` makes them.
        latencies: Some of `LATENCIES`; the others are left out.
    """
    ordered = sorted(results, key=lambda result: list(_TABLES).index(_kind(result)))
    tables = [
        _TABLES[kind](list(same_kind), latencies) for kind, same_kind in groupby(ordered, key=_kind)
    ]
    return "\n\n".join([*tables, *dict.fromkeys(map(_machine, results))])


def _kind(result: Result) -> str:
    benchmark: str = result["benchmark"]
    return "requests" if benchmark in _REQUEST_BENCHMARKS else benchmark


def _requests(results: Sequence[Result], latencies: Sequence[str]) -> str:
    head = ["bench", "what", "load", "requests/s", "output tokens/s"]
    head += [f"{LATENCIES[name].removesuffix('_s').upper()} ms" for name in latencies]
    head += ["good", "failed", "CPU s", "load average"]
    rows = []
    for result in results:
        figures = result["run"]["figures"]
        rows.append(
            [
                result["benchmark"],
                result["target"],
                load_text(result["load"]),
                f"{figures['requests_per_s']:.2f}",
                f"{figures['output_tokens_per_s']:.1f}",
                *(quantiles(figures[LATENCIES[name]]) for name in latencies),
                f"{figures['goodput_ratio']:.0%}" if figures["slo"] else NONE,
                str(figures["num_failed"]),
                cpu_text(result["run"]["conditions"], "service"),
                load_averages(result["run"]["conditions"]),
            ]
        )
    return markdown_table(head, rows)


def _stage(results: Sequence[Result], _: Sequence[str]) -> str:
    head = [
        "what",
        "load",
        "micro-batches",
        "served tokens/s",
        "bare tokens/s",
        "bare stages s",
        "their CPU s",
        "served / bare",
        "load average",
    ]
    rows = [
        [
            result["target"],
            load_text(result["load"]),
            str(each["num_micro_batches"]),
            f"{each['served_tokens_per_s']:.1f}",
            f"{each['bare_tokens_per_s']:.1f}",
            *(", ".join(f"{stage[key]:.2f}" for stage in each["bare"]) for key in _BARE_KEYS),
            f"{each['served_over_bare']:.2f}",
            load_averages(each["conditions"]["served"]),
        ]
        for result in results
        for each in result["rounds"]
    ]
    return markdown_table(head, rows)


def _transport(results: Sequence[Result], _: Sequence[str]) -> str:
    """A row for each depth and size, with the transports side by side."""
    hops = [hop for result in results for hop in result["hops"]]
    transports = list(dict.fromkeys(hop["transport"] for hop in hops))
    head = ["stages", "bytes"]
    head += [f"{name}: hop ms p50 / p99, CPU ms" for name in transports]
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for hop in hops:
        cell = f"{milliseconds(hop['hop_s']['p50'])} / {milliseconds(hop['hop_s']['p99'])}, "
        cell += milliseconds(hop["cpu_s"])
        cells.setdefault((hop["num_stages"], hop["num_bytes"]), {})[hop["transport"]] = cell
    rows = [
        [str(depth), size_text(num_bytes), *(row.get(name, NONE) for name in transports)]
        for (depth, num_bytes), row in cells.items()
    ]
    return markdown_table(head, rows)


def _front(results: Sequence[Result], _: Sequence[str]) -> str:
    """A row for each run; CPU time for each output token."""
    head = ["streams", "proxy", "output tokens/s", "tokens a message", "TPOT ms"]
    head += [f"{name} us/token" for name in (*_FRONT_PARTS, "all", "client")]
    rows = []
    for each in (each for result in results for each in result["runs"]):
        figures, cpu_s = each["run"]["figures"], each["run"]["conditions"]["cpu_s"]
        num_tokens = figures["num_output_tokens"]
        rows.append(
            [
                str(each["num_streams"]),
                each["proxy"],
                f"{figures['output_tokens_per_s']:.0f}",
                f"{num_tokens / figures['num_messages']:.2f}",
                quantiles(figures["tpot_s"]),
                *(
                    f"{1e6 * cpu_s[name] / num_tokens:.0f}"
                    for name in (*_FRONT_PARTS, "service", "client")
                ),
                load_averages(each["run"]["conditions"]),
            ]
        )
    return markdown_table([*head, "load average"], rows)


def _recovery(results: Sequence[Result], _: Sequence[str]) -> str:
    """A row for each death, in seconds."""
    phases = ("detect", "restart", "reload", "reconnect", "prefill", "pause")
    rows = [
        [
            result["target"],
            f"{result['num_streams']} x {result['input_len']} + {result['output_len']}",
            f"stage {each['stage_id']}",
            *(f"{each[f'{phase}_s']:.2f}" for phase in phases),
            load_averages(result["conditions"]),
        ]
        for result in results
        for each in result["recoveries"]
    ]
    head = ["what", "streams x prompt + output tokens", "killed"]
    return markdown_table([*head, *(f"{phase} s" for phase in phases), "load average"], rows)


_TABLES: dict[str, Callable[[Sequence[Result], Sequence[str]], str]] = {
    "requests": _requests,
    "stage": _stage,
    "transport": _transport,
    "front": _front,
    "recovery": _recovery,
    "compare": comparisons,
}


def _machine(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = machine["commit"] or "unknown"
    return (
        f"{machine['hardware']}, {machine['num_cores']} cores; {versions}; commit {commit}; "
        f"{result['time'][:10]}"
    )
