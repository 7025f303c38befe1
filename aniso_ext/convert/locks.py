"""Who works on a conversion: byte locks on its manifest, which the kernel lets go when a process ends.

Byte 0 is the mutex of everything short: reading and growing the manifest, arriving and leaving. Worker r of w holds
byte w 2^32 + r as long as it lives. Locks belong to the open file (Linux "open file description" locks), so that two
conversions in one process exclude each other as well; nothing is ever written to say that somebody is there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from aniso_ext.convert.workers import Worker

_FLOCK = "hhqqi"
_MUTEX = 0
_REGION = 1 << 32


class ByteLocks:
    """The locks of one open manifest."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """Wait for the mutex and hold it."""
        self._call(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, _MUTEX, 1)
        try:
            yield
        finally:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _MUTEX, 1)

    def claim(self, worker: Worker) -> bool:
        """Become this worker; False if a living process is."""
        try:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, worker.world * _REGION + worker.rank, 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def others(self) -> int | None:
        """World size of some other worker that lives; None if there is none."""
        kind, start = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _REGION, 0)
        return None if kind == fcntl.F_UNLCK else start // _REGION

    def _call(self, command: int, kind: int, start: int, length: int) -> tuple[int, int]:
        answer = fcntl.fcntl(self._descriptor, command, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
        kind, _, start, _, _ = struct.unpack(_FLOCK, answer)
        return kind, start
