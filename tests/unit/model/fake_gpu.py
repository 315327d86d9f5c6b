"""A GPU that computes nothing: tensors on it have a shape, a type and a device, but no numbers.

Operators refuse tensors of two devices, as on a real one. Whoever reads a number waits for the GPU;
how often is counted, and each number is 0.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

from gllm_ray.model.operators.build import OperatorsUnavailableError, _find_compiler

DEVICE = torch.device("cuda", 0)
# A torch that is built without CUDA has nothing that switches devices, and refuses to index.
_DEVICE_SWITCH = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@dataclass
class FakeGpu:
    """How often the GPU was waited for."""

    num_waits: int = 0

    def read(self, tensor: FakeTensor):
        self.num_waits += 1
        return _zeros(tensor.shape)

    def stream(self, _):
        """The only one."""
        return self

    def synchronize(self):
        self.num_waits += 1

    def take(self, model: nn.Module) -> None:
        """Move the weights here; tied ones stay tied."""
        moved: dict[torch.Tensor, torch.Tensor] = {}

        def move(tensor):
            if tensor not in moved:
                moved[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
            return moved[tensor]

        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
                module._parameters[name] = nn.Parameter(move(tensor), requires_grad=False)
            for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
                module._buffers[name] = move(tensor)


class _NumbersOnCpu(TorchFunctionMode):
    """Tensors on the CPU that have numbers keep them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs or {})
        return function(*args, **kwargs or {})


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Within it, `DEVICE` exists; a test without a compiler is skipped."""
    if not torch.backends.cuda.is_built() and (reason := _load_device_switch()) is not None:
        pytest.skip(reason)
    gpu, mode, from_numpy = FakeGpu(), FakeTensorMode(), torch.from_numpy

    def keep_numbers(array):
        with unset_fake_temporarily():  # they are read on the CPU
            return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", keep_numbers)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: mode.from_tensor(tensor))
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: gpu.read(tensor))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with mode, torch.inference_mode(), _NumbersOnCpu():
        yield gpu


def _zeros(shape):
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


@cache
def _load_device_switch() -> str | None:
    """Returns why it cannot be, or None."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "switch.cpp", Path(directory) / "switch.so"
        source.write_text(_DEVICE_SWITCH)
        try:
            command = [*_find_compiler(), "-std=c++20", "-shared", "-fPIC", source, "-o", library]
        except OperatorsUnavailableError as error:
            return str(error)
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-L{path}" for path in library_paths()]
        subprocess.run([*command, "-lc10"], check=True)
        ctypes.CDLL(str(library))
    return None
