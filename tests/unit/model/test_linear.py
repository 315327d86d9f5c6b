"""Linear layers by the C++ operator compute what torch's compute."""

from unittest.mock import ANY

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gllm_ray.errors import ConfigError
from gllm_ray.model import linear
from gllm_ray.model.linear import (
    Int8Linear,
    OperatorLinear,
    PackedLinear,
    quantize_linears,
    speed_up_linears,
)
from gllm_ray.model.operators.build import (
    OperatorsUnavailableError,
    cpu_description,
    load_operators,
)


@pytest.fixture(scope="module", autouse=True)
def _operators():
    try:
        load_operators()
    except OperatorsUnavailableError as error:
        pytest.skip(str(error))


def make_linear(depth, columns, *, bias, dtype, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(depth, columns, bias=bias).to(dtype).requires_grad_(False)
    plain = nn.Linear(depth, columns, bias=bias).to(dtype).requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    speed_up_linears(layer)
    assert type(layer) in (OperatorLinear, PackedLinear)
    return layer, plain


@given(
    rows=st.integers(0, 40) | st.integers(60, 100),
    depth=st.sampled_from([1, 7, 16, 24, 48, 200]),
    columns=st.sampled_from([1, 3, 4, 5, 64, 130, 160]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    emulated=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=200)
def test_outputs_are_those_of_torch(rows, depth, columns, bias, dtype, emulated, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "cpu_description", lambda: "" if emulated else "amx_bf16")
        layer, plain = make_linear(depth, columns, bias=bias, dtype=dtype, seed=seed)
        inputs = torch.randn(1, rows, depth).to(dtype)
        output, expected = layer(inputs), plain.double()(inputs.double())
    assert output.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_more_rows_than_the_cache_holds_are_multiplied_in_groups():
    layer, plain = make_linear(4096, 64, bias=True, dtype=torch.float32)
    inputs = torch.randn(150, 4096)
    expected = plain.double()(inputs.double())
    torch.testing.assert_close(layer(inputs).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(dtype, monkeypatch):
    monkeypatch.setattr(linear, "cpu_description", str)  # of a CPU where torch is not faster
    layer, _ = make_linear(4104, 96, bias=True, dtype=dtype)
    assert type(layer) is PackedLinear
    inputs = torch.randn(130, 4104).to(dtype)
    whole = layer(inputs)
    for rows in (*range(1, 16), 28, 29, 129):
        assert torch.equal(layer(inputs[:rows]), whole[:rows])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(inputs), whole)
    finally:
        torch.set_num_threads(num_threads)


def test_strided_inputs_are_read():
    layer, plain = make_linear(32, 8, bias=False, dtype=torch.float32)
    inputs = torch.randn(32, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer(inputs), plain(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_takes_no_more_memory_and_can_be_read(dtype):
    layer, plain = make_linear(24, 96, bias=False, dtype=dtype)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.weight.dtype is dtype
    assert [tensor.nbytes for tensor in layer.state_dict().values()] == [plain.weight.nbytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_an_embedding_reads_too_stays_as_it_is(dtype):
    embedding, head = nn.Embedding(64, 8, dtype=dtype), nn.Linear(8, 64, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.clone()
    speed_up_linears(nn.Sequential(embedding, head).requires_grad_(False))
    assert head.weight is embedding.weight
    assert torch.equal(embedding.weight, before)
    inputs = torch.randn(3, 8).to(dtype)
    expected = nn.functional.linear(inputs.double(), before.double()).to(dtype)
    torch.testing.assert_close(head(inputs), expected)


@pytest.mark.parametrize(
    ("dtype", "features", "num_by_operator"),
    [
        (torch.float32, "avx2 amx_bf16", 4),
        (torch.bfloat16, "avx512f amx_bf16", 2),
        (torch.bfloat16, "avx512f", 4),
    ],
)
def test_torch_multiplies_many_rows_of_a_type_that_the_cpu_knows_and_the_operator_does_not(
    dtype, features, num_by_operator, monkeypatch
):
    monkeypatch.setattr(linear, "cpu_description", lambda: f"x86_64\nflags\t: fpu {features}")
    layer, _ = make_linear(16, 15, bias=False, dtype=dtype)
    assert type(layer) is OperatorLinear
    calls = []
    layer.operator = lambda output, *_: calls.append(output)
    for rows in (1, 16, 17, 100):
        layer(torch.randn(rows, 16).to(dtype))
    assert len(calls) == num_by_operator


def test_weights_are_packed_unless_torch_multiplies_many_rows_faster(monkeypatch):
    for features, dtypes in (("amx_bf16", {torch.float32}), ("avx512f", set(linear.DTYPES))):
        monkeypatch.setattr(linear, "cpu_description", lambda features=features: features)
        layers = [make_linear(16, 64, bias=False, dtype=dtype)[0] for dtype in linear.DTYPES]
        packed = {layer.panels.dtype for layer in layers if type(layer) is PackedLinear}
        assert packed == dtypes


@pytest.mark.skipif(
    "avx512_bf16" not in cpu_description() or "amx_bf16" in cpu_description(),
    reason="this CPU cannot multiply pairs of bfloat16, or torch does it faster",
)
def test_bfloat16_is_packed_in_pairs_where_the_cpu_multiplies_them():
    for dtype, together in ((torch.bfloat16, 2), (torch.float32, 1)):
        layer, _ = make_linear(16, 64, bias=False, dtype=dtype)
        assert layer.panels.shape == (64 / layer.panels.shape[2], 16 / together, ANY, together)
    assert make_linear(15, 64, bias=False, dtype=torch.bfloat16)[0].panels.shape[-1] == 1


def test_only_plain_linears_of_known_types_change():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 64), nn.Linear(4, 64).half(), nn.LayerNorm(4))
    keys = list(model.state_dict())
    speed_up_linears(model)
    assert [type(module) for module in model] == [OperatorLinear, Own, nn.Linear, nn.LayerNorm]
    assert list(model.state_dict()) == keys


def make_int8_linear(depth, columns, *, bias, dtype, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(depth, columns, bias=bias).to(dtype).requires_grad_(False)
    weight = layer.weight.clone()
    quantize_linears(nn.Sequential(layer))
    return layer, weight


@given(
    rows=st.integers(0, 40) | st.integers(60, 100),
    depth=st.sampled_from([1, 7, 16, 24, 48, 200]),
    columns=st.sampled_from([1, 3, 4, 5, 64, 130, 160]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=200)
def test_int8_outputs_are_those_of_the_weights_that_are_kept(
    rows, depth, columns, bias, dtype, seed
):
    layer, _ = make_int8_linear(depth, columns, bias=bias, dtype=dtype, seed=seed)
    kept = layer.int8_weight.double() * layer.scales.double()[:, None]
    speed_up_linears(layer)
    inputs = torch.randn(1, rows, depth).to(dtype)
    expected = inputs.double() @ kept.T + (layer.bias.double() if bias else 0)
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(layer(inputs).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_weights_are_off_by_half_a_step_at_most_also_without_the_operator(dtype):
    layer, weight = make_int8_linear(48, 33, bias=False, dtype=dtype)
    kept = layer.int8_weight * layer.scales[:, None]
    half_step = weight.float().abs().amax(dim=1) / 127 / 2
    assert ((kept - weight.float()).abs() <= half_step[:, None] * (1 + 1e-5)).all()
    inputs = torch.randn(3, 48).to(dtype)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, kept.to(dtype)))
    assert layer(inputs).dtype is dtype


def test_a_row_of_zeros_stays_zero_as_int8():
    layer = nn.Linear(8, 2, bias=False).requires_grad_(False)
    layer.weight[0] = 0
    quantize_linears(nn.Sequential(layer))
    assert (layer(torch.randn(4, 8))[:, 0] == 0).all()


def test_int8_takes_a_quarter_of_the_memory_of_float32_and_a_scale_for_each_output():
    layer, weight = make_int8_linear(64, 32, bias=False, dtype=torch.float32)
    assert type(layer) is Int8Linear
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert held == weight.nbytes / 4 + 32 * 4


def test_int8_is_refused_where_linear_layers_hold_little():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(4, 64, 64))
            self.head = nn.Linear(64, 64)

    with pytest.raises(ConfigError, match=r"quantization='int8': must be left out, because 4096 "):
        quantize_linears(Experts())
