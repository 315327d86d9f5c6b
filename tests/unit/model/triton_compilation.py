"""Compiles the Triton kernels as attention launches them, for a GPU that need not be here.

A program of its own, because Triton either interprets or compiles for the life of a process:
`python -m tests.unit.model.triton_compilation CAPABILITY` prints one JSON object for each kernel.
"""

import functools
import json
import sys
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gllm_ray.model.attention.triton_attention import TritonAttention
from tests.unit.model.attention_problems import Case, Problem

# Decodes with long contexts, and prefill chunks.
MIXED = Case([(4000, 1), (10, 1), (0, 90)], 16, 2, 4, 128, 128, None, None, False, 0)
CASES = [
    (replace(MIXED, key_width=key_width, value_width=value_width, **rest), dtype)
    for key_width, value_width, dtype, rest in (
        (128, 128, torch.bfloat16, {}),
        (64, 64, torch.float16, {"has_sinks": True, "window": 128}),
        (256, 256, torch.bfloat16, {"softcap": 50.0, "window": 4096}),
        (128, 128, torch.float32, {}),
        (192, 128, torch.bfloat16, {"group": 1}),
        (80, 96, torch.float16, {"group": 71, "num_kv_heads": 1}),
        (256, 256, torch.bfloat16, {"group": 128, "num_kv_heads": 1}),
        (576, 512, torch.bfloat16, {"group": 128, "num_kv_heads": 1, "caches_latents": True}),
    )
]


class _AbsentGpu:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main() -> None:
    triton.runtime.driver.set_active(_AbsentGpu(int(sys.argv[1])))
    run = JITFunction.run

    @functools.wraps(run)
    def only_compile(function, *args, grid, warmup, **options):
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        facts = {"kernel": function.__name__, "shared_bytes": kernel.metadata.shared}
        facts |= {"binary_bytes": len(kernel.asm["cubin"])}
        print(json.dumps(facts))  # noqa: T201 - the output of the program

    JITFunction.run = only_compile
    for case, dtype in CASES:
        problem = Problem(case, dtype, slots_first=True)
        attention = TritonAttention(num_processors=132)
        cache, slots = problem.cache, problem.inputs.slot_mapping
        attention.write(cache, slots, cache.keys[:, : len(slots)], cache.values[:, : len(slots)])
        problem.paged(attention.attend)


if __name__ == "__main__":
    main()
