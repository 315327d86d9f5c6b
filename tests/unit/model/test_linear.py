"""Linear layers by the C++ operator compute what torch's compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gllm_ray.model import linear
from gllm_ray.model.linear import FewRowsLinear, speed_up_linears
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators


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
    assert type(layer) is FewRowsLinear
    return layer, plain


@given(
    rows=st.integers(0, 40) | st.integers(60, 70),
    depth=st.sampled_from([1, 7, 16, 24, 48, 200]),
    columns=st.sampled_from([1, 3, 4, 5, 64, 130]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    emulated=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=200)
def test_outputs_are_those_of_torch(rows, depth, columns, bias, dtype, emulated, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "cpu_description", lambda: "" if emulated else "avx512_bf16")
        patch.setattr(linear, "_NUM_CONVERTED", 50)
        layer, plain = make_linear(depth, columns, bias=bias, dtype=dtype, seed=seed)
        inputs = torch.randn(1, rows, depth).to(dtype)
        output, expected = layer(inputs), plain.double()(inputs.double())
    assert output.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(dtype):
    layer, _ = make_linear(104, 67, bias=True, dtype=dtype)
    inputs = torch.randn(16, 104).to(dtype)
    whole = layer(inputs)
    for rows in range(1, 16):
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


@pytest.mark.parametrize(
    ("dtype", "features", "max_rows"),
    [
        (torch.float32, "avx2", 16),
        (torch.bfloat16, "avx512f avx512_bf16", 16),
        (torch.bfloat16, "avx512f", 64),
    ],
)
def test_torch_multiplies_many_rows_and_more_are_few_where_it_emulates_the_type(
    dtype, features, max_rows, monkeypatch
):
    monkeypatch.setattr(linear, "cpu_description", lambda: f"x86_64\nflags\t: fpu {features}")
    layer, _ = make_linear(16, 16, bias=False, dtype=dtype)
    assert layer.max_rows == max_rows
    calls = []
    layer.operator = lambda *arguments: calls.append(arguments)
    for rows in (1, max_rows, max_rows + 1, 100):
        layer(torch.randn(rows, 16).to(dtype))
    assert len(calls) == 2


def test_only_plain_linears_of_known_types_change():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).half(), nn.LayerNorm(4))
    keys = list(model.state_dict())
    speed_up_linears(model)
    assert [type(module) for module in model] == [FewRowsLinear, Own, nn.Linear, nn.LayerNorm]
    assert list(model.state_dict()) == keys
