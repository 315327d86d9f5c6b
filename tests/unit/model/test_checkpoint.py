import json
import subprocess
import sys

import pytest

from gllm_ray.config import ModelConfig
from gllm_ray.errors import ConfigError
from gllm_ray.model.checkpoint import find_directory, find_weight_files, open_checkpoint

LLAMA = {"model_type": "llama", "max_position_embeddings": 128, "hidden_size": 64}


@pytest.fixture
def checkpoint_dir(tmp_path):
    """Writes a config.json and empty files; the checks read no weights."""

    def write(config=LLAMA, files=("model.safetensors",)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name in files:
            (tmp_path / name).touch()
        return tmp_path

    return write


def open_path(path, **settings):
    return open_checkpoint(ModelConfig(path=str(path), **settings))


def weight_files(path, layers=None):
    return [file.name for file in find_weight_files(ModelConfig(path=str(path)), layers)]


def test_a_servable_checkpoint_tells_its_length(checkpoint_dir):
    path = checkpoint_dir()
    checkpoint = open_path(path)
    assert checkpoint.directory == path
    assert checkpoint.max_model_len == 128
    assert weight_files(path) == weight_files(path, range(1)) == ["model.safetensors"]


def test_a_stage_needs_the_files_of_its_layers_and_of_what_is_of_no_layer(checkpoint_dir):
    weight_map = {
        "model.embed_tokens.weight": "a.safetensors",
        "model.layers.0.mlp.experts.11.w1.weight": "a.safetensors",
        "model.layers.1.mlp.experts.0.w1.weight": "b.safetensors",
        "model.layers.11.self_attn.q_proj.weight": "c.safetensors",
        "model.norm.weight": "d.safetensors",
    }
    path = checkpoint_dir(files=sorted(set(weight_map.values())))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    every = [f"{name}.safetensors" for name in "abcd"]
    assert weight_files(path) == weight_files(path, range(12)) == every
    assert weight_files(path, range(1)) == [every[0], every[3]]
    assert weight_files(path, range(1, 11)) == [every[0], every[1], every[3]]
    (path / "c.safetensors").unlink()
    assert weight_files(path, range(1, 11)) == [every[0], every[1], every[3]]
    for find in (open_path, lambda path: weight_files(path, range(10, 12))):
        with pytest.raises(ConfigError, match=r"there is no c.safetensors"):
            find(path)


def test_dummy_weights_need_config_json_alone(checkpoint_dir):
    assert open_path(checkpoint_dir(files=()), load_format="dummy").max_model_len == 128


def test_a_missing_path_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model.path='/no/such/model': there is no directory"):
        open_path("/no/such/model")


def test_a_directory_without_config_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config.json in"):
        open_path(tmp_path)


def test_a_config_json_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no valid JSON"):
        open_path(tmp_path)


@pytest.mark.parametrize("model_type", ["brand_new", None])
def test_a_checkpoint_that_needs_its_own_code_is_refused(model_type, checkpoint_dir):
    auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    path = checkpoint_dir({"model_type": model_type, "auto_map": auto_map})
    with pytest.raises(ConfigError, match=r"auto_map.*never run"):
        open_path(path)


def test_a_checkpoint_of_pickles_alone_is_refused(checkpoint_dir):
    path = checkpoint_dir(files=("pytorch_model.bin",))
    with pytest.raises(ConfigError, match=r"only safetensors.*it has pytorch_model.bin"):
        open_path(path)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "awq"}, "by awq cannot be read; must be fp8, mxfp4 or"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "by compressed-tensors, pack-quantized cannot be read",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"a block is \[128\]; must be two"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "transform_config": {"config_groups": {"R1": {}}},
            },
            "compressed-tensors with a transform_config cannot be read",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "a": {"weights": {"block_structure": [128, 128]}},
                    "b": {"weights": {"block_structure": [64, 64]}},
                },
            },
            "blocks differ",
        ),
        ({"bits": 4}, "by an unknown method cannot be read"),
        ("fp8", "by an unknown method cannot be read"),
    ],
)
def test_a_quantization_that_cannot_be_read_is_refused(quantization, reason, checkpoint_dir):
    path = checkpoint_dir(LLAMA | {"quantization_config": quantization})
    with pytest.raises(ConfigError, match=f"model.path=.*quantization_config: .*{reason}"):
        open_path(path)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": None}}},
        },
    ],
)
def test_a_quantization_that_is_undone_at_load_is_accepted(quantization, checkpoint_dir):
    path = checkpoint_dir(LLAMA | {"quantization_config": quantization})
    assert open_path(path).max_model_len


def test_a_quantization_that_is_null_is_none(checkpoint_dir):
    assert open_path(checkpoint_dir(LLAMA | {"quantization_config": None})).max_model_len


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "state beside the KV cache"),
        ({"model_type": "bloom"}, "outside of transformers' attention interface"),
        ({"model_type": "deepseek_v32"}, "sparse-attention indexer"),
        ({"model_type": "gemma3", "text_config": {}}, "more than text"),
        ({"model_type": "brand_new"}, "never compared"),
        ({}, "never compared"),
        (LLAMA | {"layer_types": ["full_attention", "mamba"]}, "layers of type mamba"),
        ({"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4}, "another width"),
    ],
)
def test_an_unsupported_architecture_is_refused_with_its_reason(config, reason, checkpoint_dir):
    with pytest.raises(ConfigError, match=reason) as caught:
        open_path(checkpoint_dir(config))
    assert repr(str(config.get("model_type"))) in str(caught.value)


def test_a_configured_length_may_be_shorter_but_not_longer_than_the_model(checkpoint_dir):
    path = checkpoint_dir()
    for max_model_len in (127, 128):
        assert open_path(path, max_model_len=max_model_len).max_model_len == max_model_len
    with pytest.raises(ConfigError, match=r"max_model_len=129: the model can serve 128 positions"):
        open_path(path, max_model_len=129)


def test_a_model_that_tells_no_length_needs_a_configured_one(checkpoint_dir):
    path = checkpoint_dir({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"set model.max_model_len"):
        open_path(path)
    assert open_path(path, max_model_len=50).max_model_len == 50


def test_length_dependent_rotary_embeddings_are_served_up_to_their_original_length(checkpoint_dir):
    rope = {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}
    config = LLAMA | {"rope_scaling": rope, "original_max_position_embeddings": 32}
    path = checkpoint_dir(config)
    assert open_path(path).max_model_len == 32
    with pytest.raises(ConfigError, match=r"can serve 32 positions"):
        open_path(path, max_model_len=33)


def test_a_package_address_leads_into_the_package():
    directory = find_directory("package://gllm_ray/model")
    assert (directory / "checkpoint.py").is_file()


def run_offline(script, hub_dir):
    """Runs a script without a network, on whatever machine."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_dir), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


OPEN = """
from gllm_ray.config import ModelConfig
from gllm_ray.model.checkpoint import find_weight_files, open_checkpoint
model = ModelConfig(path="someone/some-model")
"""


def test_an_id_that_the_hub_cannot_provide_is_refused(tmp_path):
    result = run_offline(OPEN + "open_checkpoint(model)", tmp_path)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert "ConfigError: model.path='someone/some-model': there is no such directory" in last_line
    assert "revision main" in last_line


def test_the_weights_of_an_id_are_needed_only_where_they_are_asked_for(tmp_path):
    repository = tmp_path / "models--someone--some-model"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    result = run_offline(OPEN + "print(open_checkpoint(model).max_model_len)", tmp_path)
    assert (result.stdout, result.stderr) == ("128\n", "")
    result = run_offline(OPEN + "find_weight_files(model)", tmp_path)
    assert "there is no model.safetensors" in result.stderr


def test_checking_a_checkpoint_imports_no_tensor_library():
    script = (
        "import sys, gllm_ray.model.checkpoint;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
