"""Which requests a benchmark sends: a workload of the simulator, with prompts."""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.bench.prompts import PROMPT_VOCAB_SIZE, LoadRequest, make_requests
from gllm_ray.errors import ConfigError
from gllm_ray.simulation.metrics import Slo
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import WorkloadConfig
from gllm_ray.strict_schema import StrictModel, parse_strictly
from gllm_ray.strict_yaml import read_yaml

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AT_ONCE = {"name": "at_once"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """A load that can be repeated.

    Attributes:
        workload: When requests come, and how long they are.
        seed: Of what is drawn.
        max_concurrency: Requests that run at once; None: as many as come.
        num_warmups: Requests that are sent first, and do not count.
        slo: What a good request is; None: nothing is asked.
    """

    workload: WorkloadConfig
    seed: int
    max_concurrency: int | None
    num_warmups: int
    slo: Slo | None

    def requests(
        self,
        repeat: int,
        *,
        vocab_size: int = PROMPT_VOCAB_SIZE,
        tokenizer: "Tokenizer | None" = None,
    ) -> list[LoadRequest]:
        """The requests; another repeat has the same lengths and arrivals, and other tokens.

        Raises:
            ConfigError: A trace cannot be read, or the workload cannot be served.
        """
        workload = Workload(self.workload, self.seed)
        seed = f"{self.seed}-{repeat}"
        requests = make_requests(workload, seed, vocab_size=vocab_size, tokenizer=tokenizer)
        if not requests:
            raise ConfigError("the workload has no request; must have one or more")
        return requests

    def warm_up(
        self, *, vocab_size: int = PROMPT_VOCAB_SIZE, tokenizer: "Tokenizer | None" = None
    ) -> list[LoadRequest]:
        """Some of the requests all at once, with tokens of their own."""
        first = islice(Workload(self.workload, self.seed), self.num_warmups)
        at_once = [replace(request, arrival_s=0.0) for request in first]
        return make_requests(at_once, "warm-up", vocab_size=vocab_size, tokenizer=tokenizer)

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return {
            "workload": self.workload.model_dump(mode="json"),
            "seed": self.seed,
            "max_concurrency": self.max_concurrency,
            "num_warmups": self.num_warmups,
            "slo": None if self.slo is None else asdict(self.slo),
        }


class _WorkloadFile(StrictModel):
    workload: WorkloadConfig


def load_workload(path: Path) -> dict[str, Any]:
    """The `workload` of a YAML file, such as a simulation's; the path of a trace is relative to it.

    Raises:
        ConfigError: The file cannot be read, or has no `workload`.
    """
    data = read_yaml(path)
    workload = data.get("workload") if isinstance(data, dict) else None
    if not isinstance(workload, dict):
        raise ConfigError(f"{path}: must have a mapping `workload`; see configs/simulation")
    if isinstance(trace := workload.get("path"), str):
        workload["path"] = str(path.parent / trace)
    return workload


def synthetic_workload(input_len: str, output_len: str) -> dict[str, Any]:
    """A workload of prompts and outputs that are a number of tokens, or as long as a dataset's."""
    lengths = {"prompt": _length(input_len), "output": _length(output_len)}
    return {"lengths": lengths, "arrivals": _AT_ONCE}


def with_arrivals(workload: dict[str, Any], rate: str) -> dict[str, Any]:
    """The same at another rate: requests a second, or `inf` for all at once."""
    try:
        rate_per_s = float(rate)
    except ValueError:
        raise ConfigError(f"request_rate={rate!r}: must be a number > 0, or inf") from None
    arrivals = _AT_ONCE if rate_per_s == float("inf") else rate_per_s
    return workload | {"arrivals": arrivals}


def parse_workload(workload: dict[str, Any]) -> WorkloadConfig:
    """Check a workload.

    Raises:
        ConfigError: One line for each mistake.
    """
    return parse_strictly(_WorkloadFile, {"workload": workload}).workload


def _length(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
