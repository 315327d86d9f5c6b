"""The pure half runs where neither a device, nor a cluster, nor a web framework is installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = "The pure half never sees a device, a cluster or a socket"

SCRIPT = """
import importlib, importlib.abc, pkgutil, sys

forbidden, modules = (text.split(",") for text in sys.argv[1:])

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Block())
for name in forbidden:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is not blocked")

for name in modules:
    module = importlib.import_module(name)
    for submodule in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        importlib.import_module(submodule.name)

from tests.factories import make_request, make_scheduler, result_of

scheduler = make_scheduler(num_stages=2)
for request_id in "abc":
    scheduler.add(make_request(request_id, num_prompt_tokens=9, max_tokens=5))
tokens = []
while not scheduler.is_idle:
    batches = []
    while (batch := scheduler.schedule()) is not None:
        batches.append(batch)
    for batch in batches:
        events = scheduler.commit(result_of(batch))
        tokens += [event.request_id for event in events if event.token_id is not None]
print("".join(sorted(tokens)))
"""


def test_the_pure_half_schedules_without_torch_ray_or_a_web_framework():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {item["name"]: item for item in pyproject["tool"]["importlinter"]["contracts"]}
    modules = [*contracts[CONTRACT]["source_modules"], "gllm_ray.cli"]
    forbidden = contracts[CONTRACT]["forbidden_modules"]
    assert {"gllm_ray.scheduling", "gllm_ray.engine", "gllm_ray.config"} < set(modules)
    assert {"torch", "ray", "fastapi", "starlette", "transformers"} <= set(forbidden)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(forbidden), ",".join(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "aaaaabbbbbccccc\n"
