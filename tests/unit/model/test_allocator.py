"""Memory that tensors free is not taken from the kernel again."""

import ctypes
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, threading
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
keep_freed_memory()
thread = threading.Thread(target=count_faults)
thread.start()
thread.join()
count_faults()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_large_tensors_that_come_and_go_cause_hardly_any_page_faults():
    command = [sys.executable, "-c", COUNT_FAULTS]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    in_thread, in_main_thread = map(int, process.stdout.split())
    # Without, a thread takes thousands of pages again.
    assert max(in_thread, in_main_thread) < 1000
