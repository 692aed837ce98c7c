"""What the allocator does with large buffers, seen through its own statistics."""

import platform
import subprocess
import sys

import pytest

IN_PAGES_OF_ITS_OWN = """
import ctypes
from attune_worker.worker.memory import LARGE_BYTES, keep_buffers_apart

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Statistics

def mapped(size, count):
    before = libc.mallinfo2().hblks
    buffers = [bytearray(size) for _ in range(count)]
    return libc.mallinfo2().hblks - before

before = mapped(LARGE_BYTES + 1, 100)
assert keep_buffers_apart()
print(before < 10, mapped(LARGE_BYTES + 1, 300) > 180, mapped(LARGE_BYTES // 2, 100) < 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such parameter")
def test_large_buffers_have_pages_of_their_own():
    """Before, they were taken from the heap; small ones still are.

    A heap that has room for one gives it that, and the first hundred may have left some: so then come more.
    """
    ran = subprocess.run(
        [sys.executable, "-c", IN_PAGES_OF_ITS_OWN], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["True"] * 3, ran.stderr
