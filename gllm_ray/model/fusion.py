"""Norms, rotary embeddings and gated MLPs by C++ operators of one pass each.

Most models of transformers have copies of Llama's code for these. Only what has the very bytecode
of Llama's is replaced, so a variant, as Gemma's norm by `1 + weight`, keeps its own.
"""

from collections.abc import Callable
from functools import partial
from inspect import isfunction
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from gllm_ray.model.linear import Int8Linear, PackedLinear
from gllm_ray.model.operators.build import load_operators

_DTYPES = (torch.float32, torch.bfloat16)
ROTARY = "apply_rotary_pos_emb"


def fuse_operators(model: nn.Module) -> None:
    """Let the parts of a model that compute what Llama's do run by C++ operators.

    MLPs only where `speed_up_linears` has packed their weights.

    Raises:
        OperatorsUnavailableError: The operators are not there.
    """
    operators = load_operators()
    for module in model.modules():
        forward = type(module).forward
        if is_copy(forward, llama.LlamaRMSNorm.forward):
            module.forward = partial(_normalize, operators.rms_norm.default, module)
        elif is_copy(forward, llama.LlamaMLP.forward):
            is_packed = isinstance(module.up_proj, PackedLinear | Int8Linear)
            if is_packed and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
                module.forward = partial(_run_gated_mlp, module)
        elif _reads_llama_rotary(forward):
            rotate = partial(_rotate, operators.rotate.default)
            module.forward = with_global(forward, ROTARY, rotate).__get__(module)


def _normalize(operator: Any, norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    if rows.dtype not in _DTYPES or rows.dtype is not norm.weight.dtype:
        return type(norm).forward(norm, rows)
    rows = rows.contiguous()
    output = torch.empty_like(rows)
    operator(output, rows, norm.weight, norm.variance_epsilon)
    return output


def _run_gated_mlp(mlp: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.up_proj(rows, gate=mlp.gate_proj(rows)))


def _rotate(
    operator: Any,  # noqa: ANN401
    query: torch.Tensor,
    key: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `[1, heads, tokens, width]` by the angles `[1, tokens, width]` of the tokens."""
    if unsqueeze_dim != 1 or not all(_can_rotate(rows, cosines) for rows in (query, key)):
        return llama.apply_rotary_pos_emb(query, key, cosines, sines, unsqueeze_dim)
    cosines, sines = cosines[0].contiguous(), sines[0].contiguous()
    rotated = []
    for rows in (query[0].transpose(0, 1), key[0].transpose(0, 1)):
        output = rows.new_empty(rows.shape)
        operator(output, rows, cosines, sines)
        rotated.append(output.transpose(0, 1)[None])
    return tuple(rotated)


def _can_rotate(rows: torch.Tensor, angles: torch.Tensor) -> bool:
    return (
        rows.dtype is angles.dtype
        and rows.dtype in _DTYPES
        and len(rows) == len(angles) == 1
        and rows.shape[-1] == angles.shape[-1]
        and rows.stride(-1) == 1
    )


def _reads_llama_rotary(function: Callable[..., Any]) -> bool:
    names = function.__globals__
    return (
        ROTARY in function.__code__.co_names
        and is_copy(names.get(ROTARY), llama.apply_rotary_pos_emb)
        and is_copy(names.get("rotate_half"), llama.rotate_half)
    )


def with_global(function: Callable[..., Any], name: str, value: object) -> FunctionType:
    """The function, for which a global name means something else."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def is_copy(function: object, original: object) -> bool:
    """Whether both functions have the same bytecode, with the same names."""
    return isfunction(function) and isfunction(original) and _body(function) == _body(original)


def _body(function: FunctionType) -> tuple[object, ...]:
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, code.co_varnames, constants, function.__defaults__
