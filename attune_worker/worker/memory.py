"""Why does a worker's memory stay what it is? Large buffers go straight back to the system.

Each answer is read into a buffer of 64 KB that is cut to what came. glibc takes such buffers from the heap they share
with everything small, and between what was cut off and what lives longer that heap grows for hours. Buffers with
pages of their own leave no holes.
"""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD = -3
"""glibc's number of the parameter, from ``malloc.h``."""

LARGE_BYTES = 32 * 1024


def keep_buffers_apart() -> bool:
    """Have glibc give every buffer of ``LARGE_BYTES`` pages of its own; False: this is another C library.

    Leaves it alone where the environment says ``MALLOC_MMAP_THRESHOLD_``.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return True
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES))
