"""What a stage loads, and how large it makes its KV cache."""

import functools
import json
import os
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from gllm_ray.config import KvCacheConfig, SchedulerConfig
from gllm_ray.errors import ConfigError
from gllm_ray.model.linear import PackedLinear
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.stages.local_pipeline import LocalPipeline
from gllm_ray.stages.worker import StageWorker
from tests.numerics.models import save_checkpoint
from tests.numerics.serving import service_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def save(name):
        path = tmp_path_factory.mktemp(name)
        save_checkpoint(name, path)
        return path

    return save


def load_stages(path, num_stages, **settings):
    config = service_config(path, num_stages=num_stages, **settings)
    workers = [StageWorker(config, stage_id) for stage_id in range(num_stages)]
    return workers, [worker.load() for worker in workers]


def logits(workers):
    """Those of the last of a few tokens of a prompt, `[1, vocab_size]`."""
    seen = []
    workers[-1]._shard.model.lm_head.register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    batch = workers[0]._batch_in_block_0([4], 4)
    hidden = None
    for worker in workers:
        worker.allocate_kv_cache(num_blocks=1)
        hidden = worker.execute(batch, hidden)
    return seen[0][0]


def test_the_last_stage_wants_the_tokenizer_that_grammars_are_going_to_need(checkpoint, tmp_path):
    config = service_config(checkpoint("llama"), num_stages=2)
    missing = config.model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    first, last = (
        StageWorker(config.model_copy(update={"model": missing}), stage_id) for stage_id in (0, 1)
    )
    first.load()
    with pytest.raises(ConfigError, match="there is no directory"):
        last.load()


def parameters(worker):
    """By name, tied ones by both and packed ones unpacked."""
    model = worker._shard.model
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            del named[f"{name}.panels"]
            named[f"{name}.weight"] = module.weight
    return named


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_read_their_own_tensors_and_together_each_tensor_once(name, num_stages, checkpoint):
    path = checkpoint(name)
    workers, infos = load_stages(path, num_stages)
    tensors = load_file(path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    shared_by_both_ends = 0
    if num_stages > 1 and name == "gpt2":
        shared_by_both_ends = tensors["transformer.wte.weight"].nbytes
    assert sum(worker.bytes_read for worker in workers) == total + shared_by_both_ends
    assert [worker.bytes_read for worker in workers] == [info.weight_bytes for info in infos]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_tied_embedding_is_read_by_both_ends_and_by_no_other_stage(num_stages, checkpoint):
    path = checkpoint("llama_tied")
    workers, _ = load_stages(path, num_stages)
    embedding = "model.embed_tokens.weight"
    for name, holder in ((embedding, 0), ("lm_head.weight", num_stages - 1)):
        holders = [stage for stage, worker in enumerate(workers) if name in parameters(worker)]
        assert holders == [holder]
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(worker.bytes_read for worker in workers) == total + tensors[embedding].nbytes


def test_stages_hold_the_layers_they_report_and_nothing_on_meta(checkpoint):
    workers, infos = load_stages(checkpoint("llama"), 3, layers=[1, 2, 1])
    assert [(info.first_layer, info.last_layer) for info in infos] == [(0, 1), (1, 3), (3, 4)]
    for worker, info in zip(workers, infos, strict=True):
        names = parameters(worker)
        layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        assert layers == set(range(info.first_layer, info.last_layer))
        assert ("model.embed_tokens.weight" in names) == worker.is_first
        assert ("model.norm.weight" in names) == ("lm_head.weight" in names) == worker.is_last
        model = worker._shard.model
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert info.num_parameters == sum(tensor.numel() for tensor in names.values())


def test_auto_split_gives_the_last_stage_fewer_layers(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path)
    _, infos = load_stages(tmp_path, 3, load_format="dummy")
    sizes = [info.last_layer - info.first_layer for info in infos]
    # A layer has 35,000 parameters, half the head 64,000.
    assert sizes == [4, 5, 3]


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_dummy_weights_are_the_same_however_the_model_is_split(name, checkpoint, tmp_path):
    shutil.copy(checkpoint(name) / "config.json", tmp_path)
    (whole,), _ = load_stages(tmp_path, 1, load_format="dummy")
    expected = parameters(whole)
    seen = set()
    for num_stages in (2, 4):
        workers, _ = load_stages(tmp_path, num_stages, load_format="dummy")
        for worker in workers:
            assert worker.bytes_read == 0
            for tensor_name, tensor in parameters(worker).items():
                assert torch.equal(tensor, expected[tensor_name])
                seen.add(tensor_name)
    assert seen == set(expected)
    matrices = [tensor for tensor in expected.values() if tensor.ndim > 1]
    assert all(tensor.std() > 0 for tensor in matrices)
    assert not torch.equal(
        expected["model.layers.0.self_attn.q_proj.weight"],
        expected["model.layers.1.self_attn.q_proj.weight"],
    )


def test_kv_blocks_are_what_fits_into_the_configured_bytes(checkpoint):
    _, (info,) = load_stages(checkpoint("llama"), 1, block_size=4)
    num_layers, num_kv_heads, head_dim = 4, 2, 16
    assert info.kv_block_bytes == 2 * num_layers * num_kv_heads * head_dim * 4 * 4
    assert info.max_kv_blocks == 2**20 // info.kv_block_bytes


def test_latent_attention_caches_latents_alone(checkpoint):
    _, (info,) = load_stages(checkpoint("deepseek_v3"), 1, block_size=4)
    num_layers, kv_lora_rank, qk_rope_head_dim = 4, 16, 8
    assert info.kv_block_bytes == num_layers * (kv_lora_rank + qk_rope_head_dim) * 4 * 4


def test_dtype_is_the_configured_one_or_that_of_config_json(checkpoint, tmp_path):
    (worker,), (info,) = load_stages(checkpoint("llama"), 1)
    assert worker.dtype is torch.float32
    (worker,), (half,) = load_stages(checkpoint("llama"), 1, dtype="bfloat16")
    assert worker.dtype is torch.bfloat16
    assert 2 * half.weight_bytes == info.weight_bytes
    assert 2 * half.kv_block_bytes == info.kv_block_bytes
    stored_half = checkpoint("llama") / "config.json"
    config = json.loads(stored_half.read_text()) | {"dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (worker,), _ = load_stages(tmp_path, 1, load_format="dummy")
    assert worker.dtype is torch.float32


@pytest.mark.parametrize("num_stages", [1, 2])
def test_int8_weights_take_less_memory_and_compute_nearly_the_same(num_stages, checkpoint):
    path = checkpoint("llama_tied")
    whole, infos = load_stages(path, num_stages)
    quantized, quantized_infos = load_stages(path, num_stages, quantization="int8")
    for info, quantized_info in zip(infos, quantized_infos, strict=True):
        assert quantized_info.num_parameters == info.num_parameters
        assert quantized_info.weight_bytes < 0.5 * info.weight_bytes
    assert ("model.embed_tokens.weight" in parameters(quantized[-1])) == (num_stages == 1)
    expected, got = (logits(workers) for workers in (whole, quantized))
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_stage_has_its_share_of_all_cores_where_the_system_knows_no_affinity(
    checkpoint, monkeypatch
):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    num_threads = torch.get_num_threads()
    try:
        load_stages(checkpoint("llama"), 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)


def test_more_stages_than_layers_are_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"num_stages=5: the model has 4 layers"):
        load_stages(checkpoint("llama"), 5)


def test_an_explicit_split_that_misses_the_layers_is_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"\[2, 3\]: adds up to 5 layers, but the model has 4"):
        load_stages(checkpoint("llama"), 2, layers=[2, 3])


@pytest.fixture
def damaged_checkpoint(checkpoint, tmp_path):
    """A copy of the llama checkpoint with changed tensors."""

    def damage(change):
        path = tmp_path / "damaged"
        shutil.copytree(checkpoint("llama"), path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return damage


UP_PROJ = "model.layers.2.mlp.up_proj.weight"


def test_a_missing_tensor_is_refused_by_the_stage_that_owns_it(damaged_checkpoint):
    path = damaged_checkpoint(lambda tensors: tensors.pop(UP_PROJ))
    config = service_config(path, num_stages=4)
    StageWorker(config, 1).load()
    with pytest.raises(ConfigError, match=rf"missing keys: \['{UP_PROJ}'\]"):
        StageWorker(config, 2).load()


def test_a_tensor_of_another_shape_is_refused(damaged_checkpoint):
    def shorten(tensors):
        tensors[UP_PROJ] = tensors[UP_PROJ][:5].clone()

    with pytest.raises(ConfigError, match=rf"mismatched keys: \[\('{UP_PROJ}'"):
        StageWorker(service_config(damaged_checkpoint(shorten)), 0).load()


def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    path = tmp_path / "truncated"
    shutil.copytree(checkpoint("llama"), path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"no intact safetensors file"):
        StageWorker(service_config(path), 0).load()


def test_a_mask_that_is_not_causal_is_refused(checkpoint, tmp_path):
    config = json.loads((checkpoint("gemma3_text") / "config.json").read_text())
    config["use_bidirectional_attention"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"mask other than a causal one"):
        StageWorker(service_config(tmp_path, load_format="dummy"), 0).load()


@pytest.mark.parametrize("stage_id", [0, 1])
@pytest.mark.parametrize("max_prefill_tokens", [1, 40, 150])
def test_the_probe_runs_as_many_rows_and_draws_as_a_batch_may_have(
    stage_id, max_prefill_tokens, checkpoint
):
    max_model_len, max_decodes = 64, 20
    policy = TokenThrottlingConfig(max_prefill_tokens=max_prefill_tokens, min_prefill_tokens=1)
    scheduler = SchedulerConfig(policy=policy, max_decodes=max_decodes)
    config = service_config(checkpoint("gpt2"), num_stages=2)
    worker = StageWorker(config.model_copy(update={"scheduler": scheduler}), stage_id)
    worker.load()
    positions, num_draws = [], []
    model = worker._shard.model
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, inputs: positions.append(inputs["position_ids"][0]), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, __, logits: num_draws.append(logits.shape[-2]))
    with torch.inference_mode():
        worker._run_largest_batches(max_model_len)
    num_rows = max_prefill_tokens + max_decodes
    assert min(map(len, positions)) >= num_rows
    last_position = max(rows.max() for rows in positions)
    assert last_position == max_model_len - 1
    if worker.is_last:
        assert max(num_draws) == num_rows
    assert worker._caches == {}


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_code_beside_a_checkpoint_of_a_served_type_is_never_run(name, checkpoint, tmp_path):
    path = tmp_path / "booby-trapped"
    shutil.copytree(checkpoint(name), path)
    marker = tmp_path / "was-run"
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "own.Own")
    tokenizer_map = {"AutoTokenizer": ["own.Own", "own.Own"]}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": own | tokenizer_map}))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": tokenizer_map}))

    (worker,), _ = load_stages(path, 1)
    assert type(worker._shard.model).__module__.startswith("transformers.")
    assert Tokenizer.load(str(path)).encode("ab") == [0, 1]
    assert not marker.exists()


def test_cpu_threads_are_shared_by_the_stages_unless_the_environment_says_otherwise(
    checkpoint, monkeypatch
):
    path, num_threads = checkpoint("llama"), torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    try:
        for set_by_environment, expected in ((None, cores), ("3", 3)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if set_by_environment is not None:
                monkeypatch.setenv("OMP_NUM_THREADS", set_by_environment)
            StageWorker(service_config(path), 0).load()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(num_threads)


def test_a_kv_cache_too_small_for_one_sequence_is_refused_before_it_is_allocated(checkpoint):
    config = service_config(checkpoint("llama"), num_stages=2)
    tiny = config.model_copy(update={"kv_cache": KvCacheConfig(block_size=4, kv_cache_bytes=4096)})
    with pytest.raises(ConfigError, match=r"max_model_len=64 tokens needs 16 blocks of 4"):
        LocalPipeline.start(tiny)
