"""Weights from the Hugging Face Hub come to a node once."""

import os
import subprocess
import sys

from tests.unit.model.hub_server import HubServer

_STAGE = """
from gllm_ray.config import ModelConfig
from gllm_ray.model.checkpoint import open_checkpoint
print(open_checkpoint(ModelConfig(path="some/model"), with_weights=True).weight_files[0])
"""


def start_stage(address, cache):
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _STAGE],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(stage):
    output, error = stage.communicate(timeout=60)
    assert stage.returncode == 0, error
    return output


def test_stages_that_start_at_once_download_a_model_once_and_a_later_replica_not_again(
    tiny_llama, tmp_path
):
    with HubServer(tiny_llama) as hub:
        first_stages = [start_stage(hub.address, tmp_path) for _ in range(2)]
        files = {outcome(stage) for stage in first_stages}
        assert hub.num_downloads["model.safetensors"] == 1
        assert hub.num_downloads["config.json"] == 1
        files.add(outcome(start_stage(hub.address, tmp_path)))
    # A replica that starts while the hub cannot be reached finds the same file.
    files.add(outcome(start_stage(hub.address, tmp_path)))
    assert len(files) == 1
    assert set(hub.num_downloads.values()) == {1}
