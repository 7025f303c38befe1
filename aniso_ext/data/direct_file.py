"""A file written in order past the page cache, where its filesystem allows that."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4 << 20
"""Written at a time: whole pages, as the disk wants them, and enough that the disk need not wait for the next."""
BLOCKS_ON_THEIR_WAY = 4
"""Written at the same time, so that a disk that answers late has other blocks to store meanwhile."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """Writes an existing file from its beginning, in blocks, some of which are on their way while the next one fills.

    Through the page cache every byte would be copied into a new page, which is up to a third of the processor time
    of a conversion, and files that others read would be pushed out of memory. The last part of a file, less than a
    block, and all of it where the filesystem refuses, does go through the cache.

    Raises:
        OSError: the file cannot be opened or written; of a block on its way, at one of the next calls.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY)
        self._direct = self._set_direct(_O_DIRECT != 0)
        self._filling, self._filled = _new_block(), 0
        self._sent = 0
        self._writers = ThreadPoolExecutor(BLOCKS_ON_THEIR_WAY, "aniso-disk")
        self._on_their_way: deque[Future[np.ndarray]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; their memory may be used again afterwards."""
        rest = np.frombuffer(data, np.uint8)
        while len(rest):
            part = rest[: BLOCK_BYTES - self._filled]
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._send()

    def close(self, beginning: bytes = b"") -> None:
        """Write what is left, then ``beginning`` over the first bytes, and close the file, which is not synced."""
        try:
            while self._on_their_way:
                self._on_their_way.popleft().result()
            self._direct = self._set_direct(False)
            self._put(self._filling[: self._filled], self._sent)
            self._put(np.frombuffer(beginning, np.uint8), 0)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the file as it is; a second call does nothing."""
        if self._descriptor < 0:
            return
        self._writers.shutdown(wait=True)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _send(self) -> None:
        written = None
        if len(self._on_their_way) == BLOCKS_ON_THEIR_WAY:
            written = self._on_their_way.popleft().result()
        self._on_their_way.append(self._writers.submit(self._put, self._filling, self._sent))
        self._sent += self._filled
        self._filling, self._filled = _new_block() if written is None else written, 0

    def _put(self, block: np.ndarray, offset: int) -> np.ndarray:
        rest = block.data
        while len(rest):
            direct = self._direct
            try:
                written = os.pwrite(self._descriptor, rest, offset)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                # refused only now, or the place is within a page, after a write that stopped there
                self._direct = self._set_direct(False)
                continue
            rest, offset = rest[written:], offset + written
        return block

    def _set_direct(self, wanted: bool) -> bool:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT
        with suppress(OSError):
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (_O_DIRECT if wanted else 0))
            return wanted
        return False


def _new_block() -> np.ndarray:
    """Pages of its own: direct writes want memory that begins with one."""
    return np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
