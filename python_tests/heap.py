"""What the process has allocated from the C library."""

from __future__ import annotations

import ctypes


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of the C library."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "in_use", "free", "releasable")]


def bytes_in_use() -> int:
    """Bytes that are allocated from the C library, by every thread."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    return int(mallinfo().in_use)
