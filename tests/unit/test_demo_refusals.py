"""What `make demo` cannot run is refused before anything starts."""

import sys

import pytest

from gllm_ray.demo.__main__ import main


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("configs/two_models.yaml", "has 2 models"),
        ("configs/no_such.yaml", "No such file"),
    ],
)
def test_the_demo_serves_one_model_of_a_file_that_exists(file, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--config", file])
    assert main() == 1
    assert f"demo failed: {file}: " in (error := capsys.readouterr().err)
    assert reason in error
