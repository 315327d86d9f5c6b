"""Weights that a checkpoint stores in few bits, in the type that the stage computes in.

Some models are published in no other way. Each weight is dequantized when it is asked for, a few
rows at a time, so that next to no memory is needed beside it.

Source: transformers' FP8 and MXFP4 integrations (what the names, the scales' shapes and the order
of the nibbles mean).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from gllm_ray.errors import ConfigError
from gllm_ray.model.quantized_checkpoint import QuantizedFormat

# Of floats that are beside a weight at a time.
_MAX_WORKSPACE = 2**18
# The numbers of four bits with a sign, two bits of exponent and one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127


class LazyTensor(Protocol):
    """A tensor that is read when it is indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """Known before it is read."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...  # noqa: ANN401 - as tensors are


def dequantized(
    tensors: Mapping[str, LazyTensor], stored: QuantizedFormat | None, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint under the names and of the sizes that the model has for them.

    Args:
        tensors: Those of the files.
        stored: How quantized ones are stored; None: there are none.
        dtype: What they become; others keep their type.

    Returns:
        Tensors that raise a `ConfigError` when they are read and lack their scales.
    """
    found: dict[str, LazyTensor] = {name: _Whole(name, tensor) for name, tensor in tensors.items()}
    for suffix in stored.scale_suffixes if stored else ():
        for scale_name in [name for name in tensors if name.endswith(suffix)]:
            name = scale_name.removesuffix(suffix)
            weight = tensors.get(name + stored.weight_suffix)
            if weight is not None:
                del found[name + stored.weight_suffix], found[scale_name]
                found[name] = _Dequantized(name, weight, tensors[scale_name], stored, dtype)
    return found


class _Whole:
    """A tensor that is used as it is stored."""

    def __init__(self, name: str, tensor: LazyTensor) -> None:
        self._name = name
        self._tensor = tensor

    @property
    def shape(self) -> Sequence[int]:
        return self._tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401
        tensor = self._tensor[index]
        if tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool:
            raise ConfigError(
                f"model.path: {self._name!r} is stored as {tensor.dtype}, but its scales are "
                "missing, or config.json has no quantization_config that tells of them"
            )
        return tensor


class _Dequantized:
    """A weight, dequantized when it is indexed."""

    def __init__(
        self,
        name: str,
        weight: LazyTensor,
        scales: LazyTensor,
        stored: QuantizedFormat,
        dtype: torch.dtype,
    ) -> None:
        self._name = name
        self._weight = weight
        self._scales = scales
        self._stored = stored
        self._dtype = dtype

    @property
    def shape(self) -> Sequence[int]:
        if not self._stored.is_mxfp4:
            return self._weight.shape
        num_experts, num_outputs, num_blocks, block_bytes = self._weight.shape
        return num_experts, num_blocks * block_bytes * 2, num_outputs

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401
        weight, scales = self._weight[...], self._scales[...]
        if self._stored.is_mxfp4:
            return from_mxfp4(weight, scales, self._dtype)[index]
        try:
            return from_float8(weight, scales, self._stored.block, self._dtype)[index]
        except ValueError as error:
            raise ConfigError(f"model.path: {self._name!r}: {error}") from None


def from_float8(
    weight: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply a weight by its scales.

    Args:
        weight: `[..., rows, columns]`, floats of 8 bits.
        scales: One for all, `[rows]` or `[rows, 1]`, or `[..., blocks, blocks]`, of which the last
            may be cut off by the weight's end.
        block: Rows and columns of a block.
        dtype: Of the result.

    Raises:
        ValueError: There are more scales, or fewer.
    """
    output = torch.empty(weight.shape, dtype=dtype)
    if weight.ndim > 2:
        for part, stored, its_scales in zip(output, weight, scales, strict=True):
            part.copy_(from_float8(stored, its_scales, block, dtype))
        return output
    num_rows, num_columns = weight.shape
    scales = scales.float().reshape(1, 1) if scales.numel() == 1 else scales.float()
    scales = scales[:, None] if scales.ndim == 1 else scales
    rows_of_scale = _size(num_rows, len(scales), block and block[0])
    columns_of_scale = _size(num_columns, scales.shape[1], block and block[1])
    for rows in torch.arange(num_rows).split(max(1, _MAX_WORKSPACE // num_columns)):
        factors = scales[rows // rows_of_scale].repeat_interleave(columns_of_scale, dim=1)
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        output[part] = weight[part].float().mul_(factors[:, :num_columns])
    return output


def _size(num: int, num_scales: int, block: int | None) -> int:
    """How many rows, or columns, share a scale."""
    if num_scales in (1, num):
        return num // num_scales
    if block is None or num_scales != -(-num // block):
        raise ValueError(f"{num_scales} scales of {num} rows or columns, in blocks of {block}")
    return block


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Experts' weights, transposed, as gpt_oss has them.

    Args:
        blocks: uint8 `[experts, outputs, inputs / 32, 16]`, two numbers in a byte, the first one in
            its lower half.
        scales: uint8 `[experts, outputs, inputs / 32]`, exponents.
        dtype: Of the result.

    Returns:
        `[experts, inputs, outputs]`.
    """
    numbers = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1)  # by byte
    num_experts, num_outputs, num_blocks, block_bytes = blocks.shape
    output = torch.empty(num_experts, num_blocks * block_bytes * 2, num_outputs, dtype=dtype)
    for expert in range(num_experts):
        rows_at_once = max(1, _MAX_WORKSPACE // output.shape[1])
        for first in range(0, num_outputs, rows_at_once):
            rows = slice(first, first + rows_at_once)
            values = functional.embedding(blocks[expert, rows].int(), pairs).flatten(2)
            exponents = scales[expert, rows].int() - _E8M0_BIAS
            output[expert, :, rows] = torch.ldexp(values, exponents[..., None]).flatten(1).T
    return output
