"""Experts that a checkpoint stores one by one, as the stacks that a model keeps of them.

transformers would read the experts of several layers before it stacks those of the first, and
stack them in steps. Here a stack is made where it is to lie, and each expert is copied there
straight from the checkpoint's mapped file.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from gllm_ray.errors import ConfigError

# To `[experts, outputs, inputs]`, of one tensor of each expert, or of several that lie in a row.
_STACKINGS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
_NUMBER = re.compile(r"\d+")


def stack_experts(
    tensors: Mapping[str, Any], config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Replace the tensors that transformers would stack by stacks that are made when indexed.

    Args:
        tensors: Those of a checkpoint, by name; they know their shape and are read when indexed.
        config: Of the model whose experts they are.
        dtype: Type of the stacks.
        device: Where they are made.
    """
    converters = [
        conversion
        for conversion in get_checkpoint_conversion_mapping(config.model_type) or ()
        if isinstance(conversion, WeightConverter) and _only_stacks(conversion)
    ]
    replaced: dict[str, Any] = {}
    for name, tensor in tensors.items():
        for converter in converters:
            # What else is to be renamed in a stack's name, the loader renames.
            stack_name, pattern = converter.rename_source_key(name)
            if pattern is not None:
                title = f"model.path={config.name_or_path!r}: {stack_name!r}"
                stack = _Stack(title, converter.source_patterns, dtype, device)
                replaced.setdefault(stack_name, stack).add(pattern, name, tensor)
                break
        else:
            replaced[name] = tensor
    return replaced


def _only_stacks(converter: WeightConverter) -> bool:
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    return steps in _STACKINGS


class _Stack:
    """What all experts of a layer have by one name, or by several in a row."""

    def __init__(
        self, title: str, patterns: list[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._title = title
        self._tensors: dict[str, dict[str, Any]] = {pattern: {} for pattern in patterns}
        self._dtype = dtype
        self._device = device

    def add(self, pattern: str, name: str, tensor: Any) -> None:  # noqa: ANN401 - read when indexed
        """Take what an expert has by one of the patterns."""
        self._tensors[pattern][name] = tensor

    def __getitem__(self, _: object) -> torch.Tensor:
        """The whole stack.

        Raises:
            ConfigError: The experts differ, or one lacks a tensor.
        """
        parts = [
            [part[name] for name in sorted(part, key=_numbers)] for part in self._tensors.values()
        ]
        counts = {len(part) for part in parts}
        shapes = {tuple(tensor.shape) for part in parts for tensor in part}
        if len(counts) > 1 or len(shapes) > 1:
            raise ConfigError(
                f"{self._title} cannot be made of its experts, which must be equally many and of "
                f"one shape, not {sorted(counts)} of shapes {sorted(shapes)}"
            )
        (num_experts,), ((num_rows, *others),) = counts, shapes
        stack = torch.empty(
            num_experts, len(parts) * num_rows, *others, dtype=self._dtype, device=self._device
        )
        for expert, place in zip(zip(*parts, strict=True), stack, strict=True):
            for tensor, rows in zip(expert, place.split(num_rows), strict=True):
                rows.copy_(tensor[...])
        return stack


def _numbers(name: str) -> list[int]:
    """By which the names of a layer's experts are in order."""
    return [int(number) for number in _NUMBER.findall(name)]
