"""A stage takes the memory of its own shard, at the end of a load and during it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gllm_ray.config import PipelineConfig
from gllm_ray.stages.placement import stage_environment
from tests.numerics.models import CONFIGS

ROOT = Path(__file__).parents[3]
HEAD_SIZE = 128
MAX_PEAK_RATIO = 1.1
EMBEDDING = "model.embed_tokens.weight"
CONVERSIONS = [{"dtype": "float32"}, {"quantization": "int8"}, {"load_format": "dummy"}]
# Of each stage of two, almost all is one layer's experts: 100 MB in bfloat16.
LARGE_EXPERTS = {"hidden_size": 1024, "num_hidden_layers": 2}
MIXTURES = {
    "qwen3_moe": {"moe_intermediate_size": 1024, "num_local_experts": 16},
    "mixtral": {"intermediate_size": 1024, "num_local_experts": 16},
    # Its checkpoint holds stacks, transposed.
    "gpt_oss": {"intermediate_size": 1024, "num_local_experts": 16}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {"moe_intermediate_size": 1024, "n_routed_experts": 16},
}
DTYPES = ["bfloat16", "float32"]
# Of which checkpoint, the stage, and its settings.
LOADS = [
    *(("llama", stage_id, {}) for stage_id in (0, 1)),
    *(("llama", 1, settings) for settings in CONVERSIONS),
    *((name, 1, {"dtype": dtype}) for name in MIXTURES for dtype in DTYPES),
]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(),
    reason="no kernel that tells what is anonymous",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tied llama of 440 MB in bfloat16, large enough for the allocator's noise to vanish."""
    path = tmp_path_factory.mktemp("large_llama")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=2048 // HEAD_SIZE,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {
        name: torch.empty(weight.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def stored_digest(checkpoint):
    """Of the weights, before any load."""
    return digest(checkpoint)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Checkpoints in bfloat16, as transformers saves them: most with each expert by itself."""
    paths = {}
    for name, sizes in MIXTURES.items():
        paths[name] = tmp_path_factory.mktemp(f"large_{name}")
        config = CONFIG_MAPPING[name](**(CONFIGS[name] | LARGE_EXPERTS | sizes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def reports(checkpoint, stored_digest, mixtures):
    """What each of `LOADS` took, in a child of one process."""
    paths = {"llama": checkpoint} | mixtures
    loads = [(str(paths[name]), *load) for name, *load in LOADS]
    process = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.measured_load", json.dumps(loads)],
        cwd=ROOT,
        env=os.environ | stage_environment(PipelineConfig(num_stages=2, device="cpu")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if not lines:
        pytest.skip("without the C++ operator nothing is packed")
    return [json.loads(line) for line in lines]


def stored_bytes(path, stage_id, layers):
    """What the checkpoint holds for a stage: a tied embedding belongs to both ends."""
    own = [EMBEDDING, *["model.norm.weight"] * stage_id]
    with safe_open(path / "model.safetensors", framework="pt") as file:
        own += [
            name
            for name in file.keys()  # noqa: SIM118 - a safetensors file is no mapping
            if name.startswith("model.layers.") and int(name.split(".")[2]) in range(*layers)
        ]
        return sum(file.get_tensor(name).nbytes for name in own)


def digest(path):
    return hashlib.sha256((path / "model.safetensors").read_bytes()).digest()


@pytest.mark.parametrize("stage_id", [0, 1])
def test_a_stage_holds_the_bytes_of_its_own_tensors_and_maps_what_it_does_not_pack(
    stage_id, checkpoint, stored_digest, reports
):
    report = reports[LOADS.index(("llama", stage_id, {}))]
    assert digest(checkpoint) == stored_digest  # packing in place changes no page of the file
    own = stored_bytes(checkpoint, stage_id, report["layers"])
    assert report["weight_bytes"] == own
    inverse_frequencies = HEAD_SIZE // 2 * 4  # computed, and kept twice by transformers
    assert report["tensor_bytes"] == own + 2 * inverse_frequencies
    assert report["peak_bytes"] <= MAX_PEAK_RATIO * own
    if stage_id == 0:
        # An embedding is not packed: it stays in the file's pages, which other replicas share.
        embedding = 8192 * 2048 * 2
        assert report["peak_bytes"] <= MAX_PEAK_RATIO * (own - embedding)


@pytest.mark.parametrize("settings", CONVERSIONS, ids=lambda each: next(iter(each.values())))
def test_weights_that_are_converted_or_made_never_lie_in_memory_twice(settings, reports):
    report = reports[LOADS.index(("llama", 1, settings))]
    assert 0.9 * report["weight_bytes"] <= report["peak_bytes"]
    assert report["peak_bytes"] <= MAX_PEAK_RATIO * report["weight_bytes"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_never_lie_in_memory_twice_however_the_checkpoint_stores_them(name, dtype, reports):
    report = reports[LOADS.index((name, 1, {"dtype": dtype}))]
    if dtype == "float32":  # the others may stay in the file's pages
        assert 0.9 * report["weight_bytes"] <= report["peak_bytes"]
    assert report["peak_bytes"] <= MAX_PEAK_RATIO * report["weight_bytes"]
