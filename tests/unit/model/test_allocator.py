"""Memory that tensors free is not taken from the kernel again."""

import ctypes
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, threading
import torch
from gllm_ray.model.allocator import keep_freed_memory

def allocate(rounds):
    for _ in range(rounds):
        first, second = torch.empty(2**20).zero_(), torch.empty(3 * 2**18).zero_()
        third = torch.empty(5 * 2**18).zero_()
        del first
        torch.empty(2**19).zero_()

def count_faults():
    allocate(40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate(10)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
thread = threading.Thread(target=count_faults)
thread.start()
thread.join()
count_faults()
"""


def count_faults(mode: str) -> list[int]:
    """In a thread, and in the main thread."""
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return [int(word) for word in process.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_large_tensors_that_come_and_go_cause_hardly_any_page_faults():
    assert max(count_faults("keep")) < 0.1 * min(count_faults("default"))
