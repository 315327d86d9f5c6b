"""Linear layers on CPU by the C++ operator, with weights as they are, packed, or as int8."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gllm_ray.errors import ConfigError
from gllm_ray.model.operators.build import cpu_description, load_operators

# Up to which bfloat16 is not left to torch where torch multiplies it faster.
_MAX_ROWS = 16
DTYPES = (torch.float32, torch.bfloat16)
_BFLOAT16_FEATURES = {"amx_bf16", "bf16", "sve_bf16", "svebf16"}
_INT8_MAX = 127
_MIN_QUANTIZED_SHARE = 0.5
# Rows of a weight that are converted at a time, to need next to no memory beside it; a multiple of
# every panel size.
_CONVERTED_ROWS = 64
_ALIGNMENT_BYTES = 64  # of torch's own memory, and of a vector load


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

    It wins most with weights that are packed for it. Those stay as they are which another module
    shares, or which packing would enlarge, and bfloat16 where the CPU has instructions for it that
    only torch uses: torch multiplies many rows of these.

    Raises:
        OperatorsUnavailableError: The operator is not there.
    """
    operator = load_operators().linear.default
    # By id: a reference would keep every packed weight's original until the last one is packed.
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    is_bfloat16_for_torch = torch_multiplies_bfloat16_faster()
    for module in model.modules():
        if type(module) is Int8Linear:
            module.operator = operator
            module.int8_weight = to_panels(module.int8_weight)
        # Subclasses may compute something else.
        elif (
            type(module) is nn.Linear
            and module.weight.dtype in DTYPES
            and module.weight.is_contiguous()
        ):
            module.operator = operator
            is_for_torch = module.weight.dtype is torch.bfloat16 and is_bfloat16_for_torch
            is_left_alone = holders[id(module.weight)] > 1 or is_for_torch
            panels = module.weight if is_left_alone else to_panels(module.weight)
            if panels is module.weight:
                module.max_rows = _MAX_ROWS if is_for_torch else None
                module.__class__ = OperatorLinear
            else:
                del module.weight
                module.panels = nn.Parameter(panels, requires_grad=False)
                module.__class__ = PackedLinear


class OperatorLinear(nn.Linear):
    """A linear layer by the C++ operator, by torch beyond `max_rows` rows if that is a number."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.max_rows is not None and input.numel() > self.max_rows * self.in_features:
            return functional.linear(input, self.weight, self.bias)
        return _multiply(self, input, self.weight)


class PackedLinear(nn.Linear):
    """A linear layer whose weight lies in memory as the C++ operator reads it.

    Attributes:
        panels: `[out_features / panel_size, in_features / n, panel_size, n]`, where `n` values of
            a row, one or two, are multiplied at once.
    """

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, a copy, for models that read it."""
        return _unpack(self.panels)

    def forward(self, input: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, times `silu(gate)`, and in its memory."""
        return _multiply(self, input, self.panels, gate=gate)


class Int8Linear(nn.Linear):
    """A linear layer of int8 weights, packed or not, with a scale for each output.

    It has no `weight`, so that a model which reads that fails instead of computing something else.
    """

    operator: Any = None

    def forward(self, input: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """See `PackedLinear`."""
        if self.operator is None or input.dtype not in DTYPES:
            weight = _unpack(self.int8_weight) * self.scales[:, None]
            output = functional.linear(input, weight.to(input.dtype), self.bias)
            return output if gate is None else functional.silu(gate) * output
        return _multiply(self, input, self.int8_weight, self.scales, gate)


def _multiply(
    module: nn.Linear,
    input: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = input.reshape(-1, module.in_features).contiguous()
    shape = len(rows), module.out_features
    output = input.new_empty(shape) if gate is None else gate.view(shape)
    module.operator(output, rows, weight, scales, module.bias, gate is not None)
    return output.view(*input.shape[:-1], module.out_features)


def to_panels(weight: torch.Tensor) -> torch.Tensor:
    """The weight in panels; as it is where the last one would have to be filled up.

    The panels take the weight's own memory, unless that is not aligned: such a weight lies in a
    mapped file, whose pages are not held twice.
    """
    pack = load_operators().pack_linear
    shape = pack(weight[:1]).shape[1:]
    if len(weight) % shape[1]:
        return weight
    if weight.data_ptr() % _ALIGNMENT_BYTES:
        return pack(weight)
    weight = weight.detach()
    for rows in weight.split(_CONVERTED_ROWS):
        rows.copy_(pack(rows).view_as(rows))
    return weight.view(-1, *shape)


def _unpack(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out_features, in_features]`, whether it is in panels or not."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1) if weight.dim() == 4 else weight


def torch_multiplies_bfloat16_faster() -> bool:
    """Whether this CPU has instructions for bfloat16 that torch uses and the operator does not."""
    features = set(cpu_description().split())
    in_pairs = load_operators().pack_linear(torch.zeros(1, 2, dtype=torch.bfloat16)).shape[-1] == 2
    return not features.isdisjoint(_BFLOAT16_FEATURES | (set() if in_pairs else {"avx512_bf16"}))


def _quantize(module: nn.Linear) -> None:
    weight = module.weight.detach()
    int8_weight = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for begin in range(0, len(weight), _CONVERTED_ROWS):
        part = slice(begin, begin + _CONVERTED_ROWS)
        rows = weight[part].to(torch.float32, copy=True)
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=1)
        scales[part] = largest.clamp(min=torch.finfo(torch.float32).tiny) / _INT8_MAX
        int8_weight[part] = rows.div_(scales[part, None]).round_()
    del module.weight
    module.register_buffer("int8_weight", int8_weight)
    module.register_buffer("scales", scales)
    module.__class__ = Int8Linear
