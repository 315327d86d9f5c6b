"""Published comparisons and what comes of them here, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from gllm_ray.bench.markdown import markdown_table

_HEAD = ["comparison, first / second", "measure", "published", "here", "verdict", "why not"]
_NAMES = {
    "tokens_per_s": "tokens/s",
    "e2e_mean_s": "mean E2E",
    "utilization": "utilization",
    "capacity_per_s": "capacity",
}


def reproduction_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each comparison."""
    return markdown_table(_HEAD, [_line(row) for row in rows])


def _line(row: Mapping[str, Any]) -> list[str]:
    ours = "no capacity of the second" if row["ours"] is None else f"{row['ours']:.2f} x"
    measure, (first, second) = row["measure"], row["runs"]
    detail = f"{_number(first[measure])} / {_number(second[measure])}"
    if first.get("num_preemptions") or second.get("num_preemptions"):
        detail += f"; preemptions {first['num_preemptions']:.0f} / {second['num_preemptions']:.0f}"
    return [
        row["what"],
        _NAMES[measure],
        f"{_published(row['published'])} ({row['source']})",
        f"{ours} ({detail})",
        row["verdict"],
        row["why"],
    ]


def _published(limits: Sequence[float] | None) -> str:
    if limits is None:
        return "> 1 x"
    least, most = limits
    return f"{least:.2f} x" if least == most else f"{least:.2f}-{most:.2f} x"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
