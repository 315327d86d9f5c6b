"""Comparisons of two services as tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from gllm_ray.bench.markdown import markdown_table
from gllm_ray.bench.result_file import Result
from gllm_ray.bench.table_cells import (
    LATENCIES,
    NONE,
    cpu_text,
    load_averages,
    load_text,
    milliseconds,
)


def comparisons(results: Sequence[Result], latencies: Sequence[str]) -> str:
    """One comparison pair by pair; several by the ratios of each."""
    if len(results) == 1:
        return _comparison(results[0], latencies)
    names = list(dict.fromkeys(name for each in results for name in _ratio_names(each, latencies)))
    settings = _settings(results)
    services = list(dict.fromkeys(settings))
    rows = [
        [
            str(services.index(setting) + 1),
            load_text(result["load"]),
            str(len(result["pairs"])),
            *(_median_and_span(result["ratios"].get(name)) for name in names),
        ]
        for result, setting in zip(results, settings, strict=True)
    ]
    table = markdown_table(
        ["services", "load", "pairs", *(f"{_title(each, '')} A/B" for each in names)], rows
    )
    return "\n\n".join([*(f"{i}. {each}" for i, each in enumerate(services, 1)), table])


def _settings(results: Sequence[Result]) -> list[str]:
    """The services of each, and on what hardware they ran if not all on the same."""
    hardware = [result["machine"]["hardware"] for result in results]
    names = (
        [""] * len(results) if len(set(hardware)) == 1 else [f"; on {each}" for each in hardware]
    )
    return [_services(result) + name for result, name in zip(results, names, strict=True)]


def _ratio_names(result: Result, latencies: Sequence[str]) -> list[str]:
    names = ["output_tokens_per_s", "goodput_per_s", "cpu_s"]
    if result["load"]["slo"] is None:
        names.remove("goodput_per_s")
    stems = [LATENCIES[name].removesuffix("_s") for name in latencies]
    names[1:1] = [f"{stem}_{quantile}_s" for stem in stems for quantile in ("p50", "p99")]
    return names


def _services(result: Result) -> str:
    return f"A: `{result['a']}`; B: `{result['b']}`"


def _median_and_span(ratio: dict[str, Any] | None) -> str:
    if ratio is None or ratio["median"] is None:
        return NONE
    return f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _comparison(result: Result, latencies: Sequence[str]) -> str:
    names = _ratio_names(result, latencies)
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
    return f"{_services(result)}; {load_text(result['load'])}\n\n{markdown_table(head, rows)}"


def _run_cells(run: dict[str, Any], names: Iterable[str], side: str) -> list[str]:
    figures = run["figures"]
    cells = []
    for name in names:
        if name == "cpu_s":
            cells.append(cpu_text(run["conditions"], side))
        elif name in figures:
            cells.append(f"{figures[name]:.1f}")
        else:
            stem, quantile, _ = name.rsplit("_", 2)
            cells.append(milliseconds(figures[f"{stem}_s"][quantile]))
    return [*cells, str(figures["num_failed"]), load_averages(run["conditions"])]


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _title(name: str, unit: str = " ms") -> str:
    """The name of a figure as the head of a column; latencies have the unit."""
    if name == "cpu_s":
        return "CPU s"
    if name.endswith("_per_s"):
        return name.removesuffix("_per_s").replace("_", " ") + "/s"
    stem, quantile, _ = name.rsplit("_", 2)
    return f"{stem.upper()} {quantile}{unit}"
