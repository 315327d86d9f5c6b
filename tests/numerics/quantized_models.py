"""Quantized copies of the small checkpoints, and what their weights then are.

Written from the formats' definitions, one number at a time where that is not too slow.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 8  # divides all sizes, as transformers needs
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "fp8 per weight": {"quant_method": "fp8", "weight_block_size": None},
    "fp8 by another name": {"quant_method": "fp8", "activation_scheme": "static"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
}


def quantize(checkpoint: Path, method: str, path: Path) -> dict[str, Tensor]:
    """Write a quantized copy of a checkpoint.

    Returns:
        What was quantized, under its old names, with the values that it has now.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (path / "config.json").write_text(json.dumps(config))
    tensors, values = {}, {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if is_quantized(name, method):
            stored, values[name] = _METHODS[method](name, tensor.float())
            tensors |= stored
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return values


def is_quantized(name: str, method: str) -> bool:
    if method == "mxfp4":
        return name.endswith(("gate_up_proj", "down_proj"))
    return name.endswith("proj.weight") or ".experts." in name


def _fp8(name: str, weight: Tensor):
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = 0.01 + torch.rand(rows, columns)
    whole = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            whole[row, column] = scales[row // BLOCK, column // BLOCK]
    stored = (weight / whole).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scales}, stored.float() * whole


def _fp8_per_weight(name: str, weight: Tensor):
    scale = torch.tensor(0.03)
    stored = (weight / scale).to(torch.float8_e4m3fn)
    activation_scale = {name.replace("weight", "activation_scale"): torch.tensor(1.0)}
    return {name: stored, f"{name}_scale_inv": scale} | activation_scale, stored.float() * scale


def _per_row(name: str, weight: Tensor):
    scales = 0.01 + torch.rand(len(weight), 1).bfloat16()
    stored = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale": scales}, stored.float() * scales.float()


def _mxfp4(name: str, weight: Tensor):
    """Of `[experts, inputs, outputs]`, stored by outputs."""
    by_output = weight.transpose(1, 2).unflatten(2, (-1, 32))
    codes = torch.randint(0, 16, by_output.shape, dtype=torch.uint8)
    exponents = torch.randint(124, 128, by_output.shape[:-1], dtype=torch.uint8)
    numbers = torch.where(codes < 8, 1.0, -1.0) * _E2M1[(codes % 8).long()]
    values = numbers * 2.0 ** (exponents[..., None].float() - 127)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {
        f"{name}_blocks": blocks,
        f"{name}_scales": exponents,
    }, values.flatten(2).transpose(1, 2).contiguous()


_METHODS = {
    "fp8": _fp8,
    "fp8 per weight": _fp8_per_weight,
    "fp8 by another name": _per_row,
    "compressed-tensors": _per_row,
    "mxfp4": _mxfp4,
}
