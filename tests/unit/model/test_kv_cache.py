"""Laws of the memory of a KV cache on CPU."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache, allocate_kv_cache

_GEOMETRY = AttentionGeometry(key_shape=(2, 64), value_shape=(2, 64), window=None)


def _allocate(num_slots: int) -> LayerKvCache:
    module = nn.Identity()
    caches = allocate_kv_cache({module: _GEOMETRY}, num_slots, torch.bfloat16, torch.device("cpu"))
    return caches[module]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_slots_hold_zeros_until_they_are_written():
    cache = _allocate(num_slots=40)
    keys = torch.randn(2, 3, 64).to(torch.bfloat16)
    cache.write(torch.tensor([0, 7, 39]), keys, -keys)
    written = [0, 7, 39]
    assert torch.equal(cache.keys[:, written], keys)
    assert torch.equal(cache.values[:, written], -keys)
    others = [slot for slot in range(40) if slot not in written]
    assert not cache.keys[:, others].any()
    assert not cache.values[:, others].any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells memory as Linux does")
def test_memory_is_taken_by_slots_that_are_written_and_by_no_others():
    before = _resident_bytes()
    cache = _allocate(num_slots=2**21)  # 1 GiB
    assert _resident_bytes() - before < 2**24
    slots = torch.arange(2**16)
    cache.write(slots, *torch.ones(2, 2, 2**16, 64, dtype=torch.bfloat16))
    assert 2**24 <= _resident_bytes() - before < 2**27
