"""Experts by the C++ operator compute what transformers' own loop over them computes."""

import copy

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gllm_ray.model import linear
from gllm_ray.model.experts import speed_up_experts
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators

HIDDEN, WIDTH, NUM_EXPERTS, NUM_CHOSEN = 64, 96, 8, 3
QWEN = Qwen3MoeConfig(
    hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=NUM_EXPERTS, hidden_act="gelu"
)
MIXTRAL = MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=NUM_EXPERTS)


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    try:
        load_operators()
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(linear, "cpu_description", str)  # of a CPU where torch is not faster


def make(experts_class, config, dtype=torch.float32):
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    experts = experts_class(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    experts = experts.to(dtype).requires_grad_(requires_grad=False)
    fast = copy.deepcopy(experts)
    speed_up_experts(fast)
    return fast, experts


def choose(num_rows, num_experts=NUM_EXPERTS):
    torch.manual_seed(num_rows)
    shares, chosen = torch.rand(num_rows, num_experts).topk(NUM_CHOSEN)
    return chosen, shares


@pytest.mark.parametrize("num_rows", [1, 2, 15, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts_class", "config"), [(Qwen3MoeExperts, QWEN), (MixtralExperts, MIXTRAL)]
)
def test_the_operator_equals_the_loop_over_experts(experts_class, config, dtype, num_rows):
    fast, experts = make(experts_class, config, dtype)
    hidden, (chosen, shares) = torch.randn(num_rows, HIDDEN).to(dtype), choose(num_rows)
    output = fast(hidden, chosen, shares)
    expected = experts.double()(hidden.double(), chosen, shares.double())
    assert output.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    fast, _ = make(Qwen3MoeExperts, QWEN, dtype)
    hidden, (chosen, shares) = torch.randn(40, HIDDEN).to(dtype), choose(40)
    whole = fast(hidden, chosen, shares)
    for rows in (slice(0, 1), slice(3, 17), slice(39, 40)):
        assert torch.equal(fast(hidden[rows], chosen[rows], shares[rows]), whole[rows])


def test_all_rows_may_choose_the_same_experts():
    fast, experts = make(Qwen3MoeExperts, QWEN)
    hidden, (chosen, shares) = torch.randn(9, HIDDEN), choose(1)
    chosen, shares = chosen.expand(9, -1), shares.expand(9, -1)
    torch.testing.assert_close(fast(hidden, chosen, shares), experts(hidden, chosen, shares))


def test_packed_experts_take_no_more_memory():
    fast, experts = make(Qwen3MoeExperts, QWEN)
    assert set(fast.state_dict()) == {"gate_up_panels", "down_panels"}
    sizes = [sum(tensor.nbytes for tensor in m.state_dict().values()) for m in (fast, experts)]
    assert sizes[0] == sizes[1]


def gpt_oss():
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=NUM_EXPERTS
    )
    return make(GptOssExperts, config)


def of_odd_widths():
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH - 1, num_experts=NUM_EXPERTS
    )
    return make(Qwen3MoeExperts, config)


@pytest.mark.parametrize("make_both", [gpt_oss, of_odd_widths])
def test_experts_with_biases_or_that_fill_no_panels_stay_as_they_are(make_both):
    fast, experts = make_both()
    assert set(fast.state_dict()) == set(experts.state_dict())
    assert "forward" not in vars(fast)


def test_bfloat16_is_left_to_torch_where_it_multiplies_that_faster(monkeypatch):
    monkeypatch.setattr(linear, "cpu_description", lambda: "flags\t: fpu amx_bf16")
    for dtype, is_fast in ((torch.float32, True), (torch.bfloat16, False)):
        fast, _ = make(Qwen3MoeExperts, QWEN, dtype)
        assert ("forward" in vars(fast)) is is_fast
