"""The garbage collector of a process that runs an engine."""

import gc

_THRESHOLDS = (50_000, 50, 100)


def relax_garbage_collector() -> None:
    """Let the collector look rarely, because it finds nothing.

    What is made for a token or a sequence is part of no cycle and is freed when it is dropped. But
    each look at all that lives, tens of thousands of objects under load, halts the engine for as
    long as many micro-batches take.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
