"""Reading, mapping, hashing, writing and syncing at the same time, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from types import TracebackType

import numpy as np

from aniso_ext.convert.crew import Crew
from aniso_ext.convert.device import Mapper, Pending
from aniso_ext.convert.digest import RowDigest
from aniso_ext.data import EmbeddingWriter, Shard

SYNC_BYTES = 64 << 20
"""Written bytes that are worth bringing to disk: little is left when the file is closed, and the disk is never idle."""


def mapped_batches(shard: Shard, mapper: Mapper, reader: Crew) -> Generator[Pending, None, None]:
    """The batches of a shard in order, each handed to the mapper, while the next ones are read.

    At most ``mapper.depth`` batches are on their way. The memory of a batch is used again once the next one is asked
    for. Whoever stops early closes the iterator, which waits for the read in progress.
    """
    in_flight: deque[Pending] = deque()
    batches = shard.stored_batches(0, shard.rows, mapper.batch_rows, mapper.buffer)
    reading: Future[np.ndarray | None] | None = reader.submit(next, batches, None)
    try:
        while True:
            while reading is not None and len(in_flight) < mapper.depth:
                rows = reading.result()
                reading = None if rows is None else reader.submit(next, batches, None)
                if rows is not None:
                    in_flight.append(mapper.submit(rows))
            if not in_flight:
                return
            first = in_flight.popleft()
            yield first
            first.release()
    finally:
        if reading is not None:
            reader.stop()


class HashedOutput:
    """Writes rows as they are stored, hashing them at the same time and syncing the file on the way.

    ``crew`` has a thread for the hash and one for the disk.
    """

    def __init__(self, writer: EmbeddingWriter, crew: Crew) -> None:
        self._writer = writer
        self._digest = RowDigest()
        self._crew = crew
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def write(self, stored: np.ndarray, dropped: np.ndarray | None = None) -> None:
        """``dropped`` are the indices of rows that were left out of this batch."""
        hashing = self._crew.submit(self._digest.update, stored)
        self._writer.write_stored(stored, dropped=dropped)
        hashing.result()
        self._unsynced += stored.nbytes
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait_for_sync()
            self._syncing, self._unsynced = self._crew.submit(self._writer.sync), 0

    def finish(self) -> str:
        """The hash of everything written; nothing runs beside the writer any more."""
        self._wait_for_sync()
        return self._digest.hexdigest()

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> HashedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._crew.stop()
