"""Norms, MLPs and rotary embeddings as kernels of `torch.compile`, for GPUs.

Only these parts: attention and the paged cache stay outside, so there is nothing that the compiler
would have to break a graph at, and what a layer compiles serves all layers and all row counts.
"""

from functools import cache, partial

import torch
from torch import nn

from gllm_ray.model.fusion import ROTARY, with_global

_COMPILED_KINDS = ("Norm", "MLP")


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Let each part be compiled when it is first called.

    Args:
        model: Any of transformers; parts are known by the ends of their classes' names, as
            `LlamaRMSNorm`.
        backend: Of `torch.compile`.
    """

    @cache
    def compiled(function: object) -> object:
        return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)

    for module in model.modules():
        forward = type(module).forward
        if type(module).__name__.endswith(_COMPILED_KINDS):
            module.forward = partial(compiled(forward), module)
        elif ROTARY in forward.__code__.co_names and ROTARY in forward.__globals__:
            rotate = compiled(forward.__globals__[ROTARY])
            module.forward = with_global(forward, ROTARY, rotate).__get__(module)
