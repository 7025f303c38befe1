"""Rows that are not brought to the device together: they stay in memory or in files and pass by in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from aniso_ext.diagnostics.rows import BATCH_ROWS, Rows

READ_ELEMENTS = 2**25
"""Numbers that are read at a time, one read ahead of what is used; more where larger pieces are asked for."""
READERS = 4


class Stream:
    """Chosen rows [n, D] (None: all) of a set in their own dtype, of which a device sees one piece after another.

    A tensor that lies on the device already is used as it is. Arrays in memory or mapped from a file are copied by
    several threads, other sets read by one; on the way to a GPU through page-locked memory.
    """

    def __init__(self, rows: Rows, chosen: np.ndarray | None, device: torch.device) -> None:
        self.device = device
        self.shape = (rows.count if chosen is None else len(chosen), rows.width)
        self._rows, self._chosen = rows, chosen
        self._resident = rows.resident(device) if chosen is None else None

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """All rows in order, ``size`` at a time, on the device; a non-finite one is an :class:`InputError`."""
        if self._resident is not None:
            yield from self._resident.split(size)
            return
        count, width = self.shape
        step = size * max(1, READ_ELEMENTS // (size * width))
        for chunk in self._read([slice(start, min(start + step, count)) for start in range(0, count, step)]):
            yield from chunk.split(size)

    def take(self, wanted: torch.Tensor) -> torch.Tensor:
        """The rows at ``wanted`` [m], in any order, on the device."""
        if self._resident is not None:
            return self._resident[wanted.to(self.device)]
        index = wanted.cpu().numpy()
        found = torch.empty(len(index), self.shape[1], dtype=self._dtype, device=self.device)
        step = max(1, READ_ELEMENTS // self.shape[1])
        starts = range(0, len(index), step)
        for start, chunk in zip(starts, self._read([index[start : start + step] for start in starts]), strict=True):
            found[start : start + step] = chunk
        return found

    def _read(self, places: Sequence[slice | np.ndarray]) -> Iterator[torch.Tensor]:
        """The rows at each of the places on the device, read while those before are used."""
        if self._chosen is not None:
            places = [self._chosen[place] for place in places]
        with ThreadPoolExecutor(READERS if self._rows.in_memory else 1) as pool:
            ahead = self._begin(pool, places[0])
            for number, place in enumerate(places):
                buffer, reads = ahead
                for read in reads:
                    read.result()
                chunk = buffer.to(self.device, non_blocking=True)
                if number + 1 < len(places):
                    ahead = self._begin(pool, places[number + 1])
                for start in range(0, chunk.shape[0], BATCH_ROWS):
                    part = slice(start, min(start + BATCH_ROWS, chunk.shape[0]))
                    self._rows.check_finite(chunk[part], _within(place, part))
                yield chunk

    def _begin(self, pool: Executor, place: slice | np.ndarray) -> tuple[torch.Tensor, list[Future[None]]]:
        """Memory for the rows at a place, and the reads that fill it."""
        count = place.stop - place.start if isinstance(place, slice) else len(place)
        buffer = torch.empty(count, self.shape[1], dtype=self._dtype, pin_memory=self.device.type == "cuda")
        size = -(-count // READERS) if self._rows.in_memory else count
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return buffer, [pool.submit(self._rows.fill, _within(place, part), buffer[part]) for part in parts]

    @cached_property
    def _dtype(self) -> torch.dtype:
        return self._rows.read(slice(0, 1), dtype=None).dtype


Matrix = torch.Tensor | Stream
"""Rows [n, D] in memory, or passing by."""


def _within(place: slice | np.ndarray, part: slice) -> slice | np.ndarray:
    """The part of a place."""
    return slice(place.start + part.start, place.start + part.stop) if isinstance(place, slice) else place[part]
