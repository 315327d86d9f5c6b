import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gllm_ray.bench import random_checkpoint
from gllm_ray.cli import main
from gllm_ray.serve_file import load_only_service

NUM_PARAMETERS = {"llama-15m": 16, "llama-113m": 113, "qwen2-500m": 494, "qwen3-moe-253m": 253}


@pytest.mark.parametrize("shape", NUM_PARAMETERS)
def test_a_shape_has_the_parameters_its_name_says(shape):
    config = AutoConfig.for_model(**random_checkpoint.SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(model.num_parameters() / 1e6) == NUM_PARAMETERS[shape]


def test_the_command_writes_a_checkpoint_that_transformers_reads_and_its_serve_file(tmp_path):
    directory, again = tmp_path / "model", tmp_path / "again"
    for each in (directory, again):
        assert main(["bench", "checkpoint", "llama-15m", str(each)]) == 0
    model, same = map(AutoModelForCausalLM.from_pretrained, (directory, again))
    for weight, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("def f(").input_ids) == "def f("
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode([7000, 16383]) == " 7000 16383"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    service = load_only_service(directory / "serve.yaml")
    assert service.model.path == str(directory)
    assert service.pipeline.num_stages == 2


def test_where_nothing_can_be_written_the_command_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "checkpoint", "llama-15m", str(tmp_path / "file" / "model")]) == 1
    assert "file" in capsys.readouterr().err
