"""How a checkpoint of quantized weights names them and their scales.

No tensor library is imported, so any process may check a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gllm_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFormat:
    """Weights that are stored in few bits, each with scales in a tensor of its own.

    A weight `name` is stored as `name + weight_suffix`, and its scales as `name` with one of
    `scale_suffixes`; what has no scales is stored as it is.

    Attributes:
        weight_suffix: Ends the name of the stored weight.
        scale_suffixes: One of them ends the name of its scales.
        block: Rows and columns that share a scale, where it is not one a row or one a weight.
    """

    weight_suffix: str
    scale_suffixes: tuple[str, ...]
    block: tuple[int, int] | None = None

    @property
    def is_mxfp4(self) -> bool:
        """Whether two numbers lie in a byte, 32 with a scale; else each is a float of 8 bits."""
        return bool(self.weight_suffix)


def quantized_format(quantization: object) -> QuantizedFormat:
    """The format that the `quantization_config` of a `config.json` describes.

    Raises:
        ConfigError: Weights in this format cannot be read.
    """
    match quantization:
        case {"quant_method": "fp8"}:
            block = quantization.get("weight_block_size")
            return _float8("_scale_inv", "_scale", block=block)
        case {"quant_method": "mxfp4"}:
            return QuantizedFormat(weight_suffix="_blocks", scale_suffixes=("_scales",))
        case {"quant_method": "compressed-tensors", "transform_config": {**steps}} if steps:
            name = "compressed-tensors with a transform_config"
        case {"quant_method": "compressed-tensors", "format": "float-quantized"}:
            return _float8("_scale", block=_block_of(quantization))
        case {"quant_method": method, "format": stored}:
            name = f"{method}, {stored}"
        case {"quant_method": method}:
            name = str(method)
        case _:
            name = "an unknown method"
    raise ConfigError(
        f"quantization_config: weights that are quantized by {name} cannot be read; must be fp8, "
        "mxfp4 or float-quantized compressed-tensors, which become full numbers at load, or none"
    )


def _float8(*scale_suffixes: str, block: Any) -> QuantizedFormat:  # noqa: ANN401 - as the file says
    return QuantizedFormat(weight_suffix="", scale_suffixes=scale_suffixes, block=_pair(block))


def _block_of(quantization: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The one that all groups of weights have that have any."""
    groups = quantization.get("config_groups")
    blocks = []
    for group in groups.values() if isinstance(groups, dict) else ():
        match group:
            case {"weights": {"block_structure": block}} if block is not None:
                blocks.append(block)
    if any(block != blocks[0] for block in blocks):
        raise ConfigError(f"quantization_config: blocks differ, {blocks}; must be of one size")
    return blocks[0] if blocks else None


def _pair(block: Any) -> tuple[int, int] | None:  # noqa: ANN401
    match block:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ConfigError(f"quantization_config: a block is {block!r}; must be two numbers above 0")
