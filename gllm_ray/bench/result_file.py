"""The JSON that benchmarks write, and that tables are made from."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gllm_ray.errors import ConfigError

FORMAT = "gllm_ray.bench.v1"

Result = dict[str, Any]


def make_result(benchmark: str, *, device: str = "cpu", **content: Any) -> Result:  # noqa: ANN401
    """A result, beside what it was measured on: hardware, versions, commit.

    Args:
        benchmark: Its name as a command.
        device: What stages run on, `cpu` or `cuda`.
        content: In JSON's types.
    """
    from gllm_ray.bench.machine import describe_machine  # it imports torch, as tables need not

    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        **content,
    }


def write_json(path: Path, value: object) -> None:
    """Write what `json` can to a file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read a result from a file.

    Raises:
        ConfigError: There is no such file, or no benchmark has written it.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: must be JSON of format {FORMAT}, as `gllm-ray bench` writes it with --json"
        )
    return result


def failures(result: Result) -> dict[str, int]:
    """Why requests failed, in all runs of a result, and how many for each reason."""
    runs = [result["run"]] if "run" in result else []
    runs += [each["run"] for each in result.get("runs", ())]
    runs += [run for pair in result.get("pairs", ()) for run in pair.values()]
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run["figures"]["errors"])
    return dict(errors)
