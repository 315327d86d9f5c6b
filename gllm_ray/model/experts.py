"""Mixtures of experts on CPU by the C++ operator, with every expert's weights packed once.

Source: transformers' `grouped_mm`: rows are sorted by expert, and each expert multiplies its own.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from gllm_ray.model.linear import DTYPES, to_panels, torch_multiplies_bfloat16_faster
from gllm_ray.model.operators.build import load_operators

# Of modules that transformers lets choose how they compute; what others keep is not known.
_TRAITS = ("has_bias", "is_transposed", "has_post_expert_norm")


def speed_up_experts(model: nn.Module) -> None:
    """Let a model's experts use the C++ operator where it wins, as its linear layers do.

    Those with biases or transposed weights stay as they are, and those that packing would enlarge.

    Raises:
        OperatorsUnavailableError: The operator is not there.
    """
    operators = load_operators()
    is_bfloat16_for_torch = torch_multiplies_bfloat16_faster()
    for module in model.modules():
        if not _has_plain_weights(module):
            continue
        weights = module.gate_up_proj, module.down_proj
        if is_bfloat16_for_torch and weights[0].dtype is torch.bfloat16:
            continue
        if all(_fills_panels(operators, weight) for weight in weights):
            del module.gate_up_proj, module.down_proj
            module.gate_up_panels, module.down_panels = map(_pack, weights)
            module.forward = partial(_forward, operators.grouped_linear.default, module)


def _has_plain_weights(module: nn.Module) -> bool:
    """Whether it keeps its experts as most do, `[experts, outputs, inputs]` without biases."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(
        isinstance(weight, nn.Parameter)
        and weight.ndim == 3
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        for weight in weights
    ) and not any(getattr(module, trait, True) for trait in _TRAITS)


def _fills_panels(operators: Any, weight: torch.Tensor) -> bool:  # noqa: ANN401
    panel_size = operators.pack_linear(weight[0, :1]).shape[2]
    return weight.shape[1] % panel_size == 0


def _pack(weight: torch.Tensor) -> nn.Parameter:
    """Panels of each expert; see `PackedLinear`."""
    panels = to_panels(weight.flatten(0, 1)).unflatten(0, (len(weight), -1))
    return nn.Parameter(panels, requires_grad=False)


def _forward(
    operator: Any,  # noqa: ANN401
    experts: nn.Module,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """Sums of `[rows, hidden]` by the experts chosen for each row, `[rows, n]`, in these shares."""
    num_chosen = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    row_ends = chosen.flatten().bincount(minlength=experts.num_experts).cumsum(0)
    rows = hidden[order // num_chosen].to(experts.down_panels.dtype)
    gate_up = _multiply(operator, rows, experts.gate_up_panels, row_ends)
    gated = experts._apply_gate(gate_up)  # noqa: SLF001 - where transformers' own forward has it
    outputs = torch.empty_like(rows)
    outputs[order] = _multiply(operator, gated, experts.down_panels, row_ends)
    weighted = outputs.view(*chosen.shape, hidden.shape[-1]) * shares[..., None]
    return weighted.sum(dim=1).to(hidden.dtype)


def _multiply(
    operator: Any,  # noqa: ANN401
    rows: torch.Tensor,
    panels: torch.Tensor,
    row_ends: torch.Tensor,
) -> torch.Tensor:
    num_columns = panels.shape[1] * panels.shape[3]
    output = rows.new_empty(len(rows), num_columns)
    operator(output, rows.contiguous(), panels, row_ends)
    return output
