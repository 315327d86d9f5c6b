"""Linear layers that are quick for few rows on CPU."""

import torch
from torch import nn
from torch.nn import functional

from gllm_ray.model.operators.build import cpu_description, load_operators

# Where torch's own multiplication begins to win: 16 rows take 0.5 to 0.8 of its time in float32,
# 32 rows 0.9 to 1.1.
_MAX_ROWS = 16
# The same for bfloat16 where torch multiplies floats, so that the weight is converted first.
_MAX_ROWS_EMULATED = 64
# Columns of a weight that are converted at a time.
_NUM_CONVERTED = 4096
_DTYPES = (torch.float32, torch.bfloat16)
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"}


def speed_up_linears(model: nn.Module) -> None:
    """Let a model's linear layers use the C++ operator where it wins.

    That is for few rows. Where the CPU has no instructions for bfloat16, torch takes several times
    as long in this type as in float32, so many rows are multiplied in float32.

    Raises:
        OperatorsUnavailableError: The operator is not there.
    """
    operator = load_operators().linear.default
    has_bfloat16 = not _BFLOAT16_FEATURES.isdisjoint(cpu_description().split())
    for module in model.modules():
        # Subclasses may compute something else.
        if type(module) is not nn.Linear or module.weight.dtype not in _DTYPES:
            continue
        if module.weight.is_contiguous():
            module.is_emulated = module.weight.dtype is torch.bfloat16 and not has_bfloat16
            module.max_rows = _MAX_ROWS_EMULATED if module.is_emulated else _MAX_ROWS
            module.operator = operator
            module.__class__ = FewRowsLinear


class FewRowsLinear(nn.Linear):
    """A linear layer by the C++ operator up to `max_rows` rows, by torch beyond them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        rows = input.reshape(-1, self.in_features)
        if len(rows) <= self.max_rows:
            output = input.new_empty(*input.shape[:-1], self.out_features)
            self.operator(output, rows.contiguous(), self.weight, self.bias)
            return output
        if not self.is_emulated:
            return functional.linear(input, self.weight, self.bias)
        values = input.float()
        parts = [
            functional.linear(values, part.float()) for part in self.weight.split(_NUM_CONVERTED)
        ]
        output = torch.cat(parts, dim=-1)
        return (output if self.bias is None else output + self.bias).to(input.dtype)
