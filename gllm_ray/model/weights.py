"""Where a shard's tensors come from: safetensors files, or a seeded generator.

Both hand out tensors that are read or made only when transformers' loader asks for them, so a
stage touches its own tensors alone.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gllm_ray.errors import ConfigError

_DUMMY_STD = 0.02


class SafetensorsReader:
    """The tensors of a checkpoint, read when indexed.

    Attributes:
        tensors: A lazy tensor for every name in the files.

    Raises:
        ConfigError: A file is damaged.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._read_sizes: list[int] = []
        self.tensors = {
            name: _LazyTensor(file.get_slice(name), self._read_sizes)
            for file in map(_open, files)
            for name in file.keys()  # noqa: SIM118 - a safetensors file is no mapping
        }

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors read so far."""
        return sum(self._read_sizes)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{str(file)!r} is no intact safetensors file: {error}") from None


class _LazyTensor:
    """A safetensors slice that notes the size of what is read through it."""

    def __init__(self, piece: Any, read_sizes: list[int]) -> None:  # noqa: ANN401 - untyped there
        self._piece = piece
        self._read_sizes = read_sizes

    @property
    def shape(self) -> Sequence[int]:
        return self._piece.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401 - any way to index a tensor
        tensor = self._piece[index]
        self._read_sizes.append(tensor.nbytes)
        return tensor


class DummyTensor:
    """Random values that depend on the tensor's name alone, made when indexed."""

    def __init__(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._name = name
        self._shape = shape
        self._dtype = dtype
        self._device = device

    def __getitem__(self, _: object) -> torch.Tensor:
        if len(self._shape) == 1 and self._name.endswith("weight"):
            return torch.ones(self._shape, dtype=self._dtype, device=self._device)
        seed = int.from_bytes(hashlib.sha256(self._name.encode()).digest()[:7], "little")
        generator = torch.Generator(self._device).manual_seed(seed)
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(std=_DUMMY_STD, generator=generator)


def dummy_tensors(
    parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, DummyTensor]:
    """Random weights for named parameters, whose own values are not looked at."""
    return {
        name: DummyTensor(name, parameter.shape, dtype, device)
        for name, parameter in parameters.items()
    }
