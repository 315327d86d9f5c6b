import gc

import pytest

from gllm_ray.garbage import no_garbage_collection


def test_the_collector_never_looks_at_what_was_made_without_it():
    runs = []
    gc.callbacks.append(note := lambda phase, info: runs.append((phase, info)))
    try:
        with no_garbage_collection():
            made = [[] for _ in range(10 * gc.get_threshold()[0])]
            runs_within = len(runs)
        assert runs_within == 0
        assert gc.isenabled()
        assert not any(each is made for each in gc.get_objects())
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()


def test_the_collector_goes_on_after_a_failure():
    try:
        with pytest.raises(ImportError), no_garbage_collection():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
