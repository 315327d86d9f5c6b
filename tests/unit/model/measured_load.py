"""Loads stages, each in a process of its own, and writes what that took; see `test_load_memory`.

Memory is the process's anonymous pages, sampled from the kernel every few milliseconds: pages of a
mapped file are not counted, for all processes of a node share them and the kernel may drop them.
"""

import gc
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators
from gllm_ray.stages.worker import StageWorker
from tests.numerics.serving import service_config

_PERIOD_S = 0.004


def anonymous_bytes():
    (line,) = (
        line
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith("Anonymous:")
    )
    return int(line.split()[1]) * 1024


def tensors():
    """Bytes of every tensor of the process, by where it lies."""
    found = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
    return {tensor.data_ptr(): tensor.nbytes for tensor in found if not tensor.is_meta}


def measure(path, stage_id, settings):
    worker = StageWorker(service_config(path, num_stages=2, **settings), stage_id)
    earlier = tensors()
    base_bytes = peak_bytes = anonymous_bytes()
    is_loaded = threading.Event()

    def sample():
        nonlocal peak_bytes
        while not is_loaded.wait(_PERIOD_S):
            peak_bytes = max(peak_bytes, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    info = worker.load()
    is_loaded.set()
    sampler.join()
    gc.collect()
    return {
        "peak_bytes": max(peak_bytes, anonymous_bytes()) - base_bytes,
        "tensor_bytes": sum(size for place, size in tensors().items() if place not in earlier),
        "weight_bytes": info.weight_bytes,
        "layers": [info.first_layer, info.last_layer],
    }


def main(loads):
    # What a load imports is no part of its shard.
    load_operators()
    for path in {path for path, *_ in loads}:
        MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(path))]
    for load in loads:
        if (child := os.fork()) == 0:
            sys.stdout.write(json.dumps(measure(*load)) + "\n")
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{load}: ended with {status}")


if __name__ == "__main__":
    with suppress(OperatorsUnavailableError):
        main(json.loads(sys.argv[1]))
