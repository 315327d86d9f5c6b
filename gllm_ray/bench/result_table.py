"""Results of benchmarks as Markdown, on the terminal and in the README."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from gllm_ray.bench.markdown import markdown_table
from gllm_ray.bench.result_file import Result

# Names of latencies, as `vllm bench serve` has them, and their keys in a result.
LATENCIES = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_s", "e2el": "e2e_s"}
_REQUEST_BENCHMARKS = ("serve", "engine", "offline")
_BARE_KEYS = ("wall_s", "cpu_s")
_FRONT_PARTS = ("proxy", "replica", "scheduler", "stages")
_NONE = "-"


def result_tables(results: Sequence[Result], latencies: Sequence[str] = tuple(LATENCIES)) -> str:
    """A table for each kind of benchmark, and what they were measured on.

    Args:
        results: As `write_result` writes them.
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
                _load(result["load"]),
                f"{figures['requests_per_s']:.2f}",
                f"{figures['output_tokens_per_s']:.1f}",
                *(_quantiles(figures[LATENCIES[name]]) for name in latencies),
                f"{figures['goodput_ratio']:.0%}" if figures["slo"] else _NONE,
                str(figures["num_failed"]),
                _cpu(result["run"]["conditions"], "service"),
                _load_average(result["run"]["conditions"]),
            ]
        )
    return markdown_table(head, rows)


def _compare(results: Sequence[Result], latencies: Sequence[str]) -> str:
    return "\n\n".join(_comparison(result, latencies) for result in results)


def _comparison(result: Result, latencies: Sequence[str]) -> str:
    names = ["output_tokens_per_s", "goodput_per_s", "cpu_s"]
    if result["load"]["slo"] is None:
        names.remove("goodput_per_s")
    stems = [LATENCIES[name].removesuffix("_s") for name in latencies]
    names[1:1] = [f"{stem}_{quantile}_s" for stem in stems for quantile in ("p50", "p99")]
    pairs, ratios = result["pairs"], result["ratios"]
    rows = []
    for number, pair in enumerate(pairs):
        rows += [
            [f"{number + 1} {side.upper()}", *_run_cells(pair[side], names, side)] for side in pair
        ]
        cells = [_ratio(ratios[each]["pairs"][number]) for each in names]
        rows.append([f"{number + 1} A/B", *cells, "", ""])
    rows.append(["median A/B", *(_ratio(ratios[each]["median"]) for each in names), "", ""])
    spans = [f"{_ratio(ratios[each]['least'])} to {_ratio(ratios[each]['most'])}" for each in names]
    rows.append(["least to most", *spans, "", ""])
    head = ["pair", *map(_title, names), "failed", "load average"]
    about = f"A: `{result['a']}`; B: `{result['b']}`; {_load(result['load'])}"
    return f"{about}\n\n{markdown_table(head, rows)}"


def _run_cells(run: dict[str, Any], names: Iterable[str], side: str) -> list[str]:
    figures = run["figures"]
    cells = []
    for name in names:
        if name == "cpu_s":
            cells.append(_cpu(run["conditions"], side))
        elif name in figures:
            cells.append(f"{figures[name]:.1f}")
        else:
            stem, quantile, _ = name.rsplit("_", 2)
            cells.append(_milliseconds(figures[f"{stem}_s"][quantile]))
    return [*cells, str(figures["num_failed"]), _load_average(run["conditions"])]


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
            _load(result["load"]),
            str(each["num_micro_batches"]),
            f"{each['served_tokens_per_s']:.1f}",
            f"{each['bare_tokens_per_s']:.1f}",
            *(", ".join(f"{stage[key]:.2f}" for stage in each["bare"]) for key in _BARE_KEYS),
            f"{each['served_over_bare']:.2f}",
            _load_average(each["conditions"]["served"]),
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
        cell = f"{_milliseconds(hop['hop_s']['p50'])} / {_milliseconds(hop['hop_s']['p99'])}, "
        cell += _milliseconds(hop["cpu_s"])
        cells.setdefault((hop["num_stages"], hop["num_bytes"]), {})[hop["transport"]] = cell
    rows = [
        [str(depth), _size(num_bytes), *(row.get(name, _NONE) for name in transports)]
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
                _quantiles(figures["tpot_s"]),
                *(
                    f"{1e6 * cpu_s[name] / num_tokens:.0f}"
                    for name in (*_FRONT_PARTS, "service", "client")
                ),
                _load_average(each["run"]["conditions"]),
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
            _load_average(result["conditions"]),
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
    "compare": _compare,
}


def _machine(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = machine["commit"] or "unknown"
    return (
        f"{machine['hardware']}, {machine['num_cores']} cores; {versions}; commit {commit}; "
        f"{result['time'][:10]}"
    )


def _load(load: dict[str, Any]) -> str:
    """A workload in few words."""
    workload = load["workload"]
    arrivals = workload["arrivals"]
    when = {"at_once": "at once", "recorded": "as recorded"}.get(arrivals["name"])
    if when is None:
        rate = arrivals.get("rate_per_s")
        when = arrivals["name"] if rate is None else f"{rate:g}/s {arrivals['name']}"
    parts = [when if workload["num_requests"] is None else f"{workload['num_requests']}, {when}"]
    if "lengths" in workload:
        lengths = workload["lengths"]
        parts.append(f"{_length(lengths['prompt'])} in, {_length(lengths['output'])} out")
    else:
        parts.append(workload["path"].rpartition("/")[2])
    if workload.get("shared_prefixes"):
        parts.append(f"{workload['shared_prefixes']['tokens']} shared")
    if load["max_concurrency"] is not None:
        parts.append(f"{load['max_concurrency']} at a time")
    return "; ".join(parts)


def _length(length: dict[str, Any]) -> str:
    name = length["name"]
    if name == "uniform":
        return f"{length['min_tokens']}-{length['max_tokens']}"
    if name == "lognormal":
        return f"median {length['median_tokens']:g}"
    return str(length["tokens"] if name == "fixed" else length["dataset"])


def _quantiles(summary: dict[str, float]) -> str:
    return " / ".join(_milliseconds(summary[name]) for name in ("p50", "p90", "p99"))


def _milliseconds(time_s: float) -> str:
    return f"{1000 * time_s:.3g}" if time_s < 0.1 else f"{1000 * time_s:.0f}"


def _cpu(conditions: dict[str, Any], name: str) -> str:
    cpu_s = conditions["cpu_s"].get(name)
    return _NONE if cpu_s is None else f"{cpu_s:.1f}"


def _load_average(conditions: dict[str, Any]) -> str:
    return f"{conditions['load_average_before']:.1f}, {conditions['load_average_after']:.1f}"


def _ratio(ratio: float | None) -> str:
    return _NONE if ratio is None else f"{ratio:.2f}"


def _title(name: str) -> str:
    """The name of a figure as the head of a column."""
    if name == "cpu_s":
        return "CPU s"
    if name.endswith("_per_s"):
        return name.removesuffix("_per_s").replace("_", " ") + "/s"
    stem, quantile, _ = name.rsplit("_", 2)
    return f"{stem.upper()} {quantile} ms"


def _size(num_bytes: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes % size == 0:
            return f"{num_bytes // size} {unit}"
    return f"{num_bytes} B"
