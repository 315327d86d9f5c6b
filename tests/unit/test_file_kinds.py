"""A file of another kind than a command takes is told apart from one with mistakes."""

from pathlib import Path

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.serve_file import load_serve_file
from gllm_ray.simulation.plan_config import load_plan_config
from gllm_ray.simulation.simulation_config import load_simulation_config

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {
    "serve": (load_serve_file, CONFIGS / "demo.yaml"),
    "simulate": (load_simulation_config, CONFIGS / "simulation" / "qwen2.5-32b-l20x4.yaml"),
    "plan": (load_plan_config, CONFIGS / "plans" / "llama70b.yaml"),
}


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_told_which_command_takes_it(kind, other):
    load, path = KINDS[kind][0], KINDS[other][1]
    if kind == other:
        assert load(path)
        return
    with pytest.raises(ConfigError, match=f"for `gllm-ray {other}`; must be .* with the key") as e:
        load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("load", [load for load, _ in KINDS.values()])
def test_a_file_of_no_kind_is_told_every_mistake(load, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("pipelin: 1\nmodel: 2\n")
    with pytest.raises(ConfigError, match="pipelin"):
        load(path)
