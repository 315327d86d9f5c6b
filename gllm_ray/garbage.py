"""The garbage collector of a process that serves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (50_000, 50, 100)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let nobody look for garbage meanwhile, nor ever among what there is by its end.

    To import torch and transformers makes objects by the hundred thousand, hardly any of them
    garbage; looking at them again and again takes a fifth of that time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # before anything is made that would set the collector off
        gc.enable()


def relax_garbage_collector() -> None:
    """Let the collector look rarely, because it finds nothing.

    What is made for a token or a sequence is part of no cycle and is freed when it is dropped. But
    each look at all that lives, tens of thousands of objects under load, halts the process for as
    long as many micro-batches take.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
