"""Weights from the Hugging Face Hub come to a node once, and only those that its stages need."""

import os
import subprocess
import sys

import pytest
from transformers import LlamaForCausalLM

from tests.unit.model.hub_server import HubServer

_STAGE = """
import sys
from gllm_ray.config import ModelConfig
from gllm_ray.model.checkpoint import find_weight_files
layers = range(*map(int, sys.argv[1:]))
print(*(file.name for file in find_weight_files(ModelConfig(path="some/model"), layers)))
"""


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    """Four layers, each in a file of its own."""
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(directory, max_shard_size="1100KB")
    return directory


def start_stage(address, cache, *layers):
    return start(_STAGE, address, cache, *layers)


def start(program, address, cache, *arguments):
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files_of(stage):
    output, error = stage.communicate(timeout=60)
    assert stage.returncode == 0, error
    return set(output.split())


def test_a_node_downloads_what_its_stages_need_once_and_nothing_for_another_replica(
    model, tmp_path
):
    every = {file.name for file in model.glob("*.safetensors")}
    with HubServer(model) as hub:
        stages = [start_stage(hub.address, tmp_path, *layers) for layers in ((0, 1), (1, 2))]
        first, second = map(files_of, stages)
        assert first != second
        assert first | second < every
        assert hub.num_downloads.keys() & every == first | second
        files_of(start_stage(hub.address, tmp_path, 2, 4))
        assert hub.num_downloads.keys() >= every
        assert files_of(start_stage(hub.address, tmp_path, 0, 1)) == first
    # A replica that starts while the hub cannot be reached finds the same files.
    assert files_of(start_stage(hub.address, tmp_path, 1, 2)) == second
    assert set(hub.num_downloads.values()) == {1}


_BATCH = """
from gllm_ray.batch.command import identify_model
from gllm_ray.config import ModelConfig
from gllm_ray.model.checkpoint import find_directory, find_weight_files
model = ModelConfig(path="some/model")
before = identify_model(model, find_directory(model.path))
find_weight_files(model)
assert identify_model(model, find_directory(model.path)) == before
print(before["commit"])
"""


def test_a_model_of_the_hub_is_the_same_to_a_batch_before_and_after_its_weights_come(
    model, tmp_path
):
    with HubServer(model) as hub:
        assert files_of(start(_BATCH, hub.address, tmp_path)) == {"0" * 40}
