"""Linear layers on CPU by the C++ operator, with weights as they are or as int8."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gllm_ray.errors import ConfigError
from gllm_ray.model.operators.build import cpu_description, load_operators

# Where torch's own multiplication begins to win: 16 rows take 0.5 to 0.8 of its time in float32,
# 32 rows 0.9 to 1.1.
_MAX_ROWS = 16
_DTYPES = (torch.float32, torch.bfloat16)
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"}
_INT8_MAX = 127
_MIN_QUANTIZED_SHARE = 0.5


def quantize_linears(model: nn.Module) -> None:
    """Keep the weights of a model's linear layers as int8, with a scale for each output.

    Only weights: activations keep their type, and sums are floats.

    Raises:
        ConfigError: Most of the model's weights are in no linear layer.
    """
    embeddings = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    )
    num_others = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    num_quantized = 0
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            num_quantized += module.weight.numel()
            _quantize(module)
    if num_quantized < _MIN_QUANTIZED_SHARE * num_others:
        raise ConfigError(
            f"model.quantization='int8': must be left out, because {num_quantized} of "
            f"{num_others} weights of {type(model).__name__} are in linear layers, the only ones "
            "that can be quantized"
        )


def speed_up_linears(model: nn.Module) -> None:
    """Let a model's linear layers use the C++ operator where it wins.

    That is for few rows; for any number of them with int8 weights, and in bfloat16 where the CPU
    has no instructions for it, for which torch takes several times as long as for float32.

    Raises:
        OperatorsUnavailableError: The operator is not there.
    """
    operator = load_operators().linear.default
    has_bfloat16 = not _BFLOAT16_FEATURES.isdisjoint(cpu_description().split())
    for module in model.modules():
        if type(module) is Int8Linear:
            module.operator = operator
        # Subclasses may compute something else.
        elif (
            type(module) is nn.Linear
            and module.weight.dtype in _DTYPES
            and module.weight.is_contiguous()
        ):
            is_emulated = module.weight.dtype is torch.bfloat16 and not has_bfloat16
            module.max_rows = None if is_emulated else _MAX_ROWS
            module.operator = operator
            module.__class__ = OperatorLinear


class OperatorLinear(nn.Linear):
    """A linear layer by the C++ operator, by torch beyond `max_rows` rows if that is a number."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        rows = input.reshape(-1, self.in_features)
        if self.max_rows is not None and len(rows) > self.max_rows:
            return functional.linear(input, self.weight, self.bias)
        output = input.new_empty(*input.shape[:-1], self.out_features)
        self.operator(output, rows.contiguous(), self.weight, None, self.bias)
        return output


class Int8Linear(nn.Linear):
    """A linear layer of int8 weights `[out_features, in_features]`, each row with a scale.

    It has no `weight`, so that a model which reads that fails instead of computing something else.
    """

    operator: Any = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.operator is None or input.dtype not in _DTYPES:
            weight = (self.int8_weight * self.scales[:, None]).to(input.dtype)
            return functional.linear(input, weight, self.bias)
        rows = input.reshape(-1, self.in_features).contiguous()
        output = input.new_empty(*input.shape[:-1], self.out_features)
        self.operator(output, rows, self.int8_weight, self.scales, self.bias)
        return output


def _quantize(module: nn.Linear) -> None:
    weight = module.weight.detach().float()
    scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _INT8_MAX
    del module.weight
    module.register_buffer("int8_weight", (weight / scales[:, None]).round().to(torch.int8))
    module.register_buffer("scales", scales)
    module.__class__ = Int8Linear
