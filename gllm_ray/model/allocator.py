"""How the C library gives memory back."""

import ctypes

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the process keep what tensors free, for the next ones.

    glibc gives large pieces back to the kernel at once, and the page faults of taking them again
    cost a prefill on CPU up to a sixth of its time. Does nothing with another C library.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
