"""Loads, times and conditions as the words of a table."""

from typing import Any

# Names of latencies, as `vllm bench serve` has them, and their keys in a result.
LATENCIES = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_s", "e2el": "e2e_s"}
NONE = "-"


def load_text(load: dict[str, Any]) -> str:
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


def quantiles(summary: dict[str, float]) -> str:
    """p50, p90 and p99 of seconds, as milliseconds; where nothing was measured, none."""
    if summary["mean"] == 0:
        return NONE
    return " / ".join(milliseconds(summary[name]) for name in ("p50", "p90", "p99"))


def milliseconds(time_s: float) -> str:
    """Seconds as milliseconds, of three digits where that is below 100."""
    return f"{1000 * time_s:.3g}" if time_s < 0.1 else f"{1000 * time_s:.0f}"


def cpu_text(conditions: dict[str, Any], name: str) -> str:
    """CPU seconds of a part, where they could be told."""
    cpu_s = conditions["cpu_s"].get(name)
    return NONE if cpu_s is None else f"{cpu_s:.1f}"


def load_averages(conditions: dict[str, Any]) -> str:
    """The machine's load average before and after."""
    return f"{conditions['load_average_before']:.1f}, {conditions['load_average_after']:.1f}"


def size_text(num_bytes: int) -> str:
    """Bytes in the largest unit that divides them."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes % size == 0:
            return f"{num_bytes // size} {unit}"
    return f"{num_bytes} B"
