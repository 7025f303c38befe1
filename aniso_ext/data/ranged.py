"""Rows of an uncompressed matrix at a remote place: indexed like a memory map, fetched by range requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aniso_ext.data.locations import RemotePath

_GAP_BYTES = 16 << 10
"""Wanted rows this close together are fetched in one request with what lies between them."""
_REQUEST_BYTES = 8 << 20
_REQUESTS = 8
"""Requests at a time; their product bounds the memory."""


@dataclass(frozen=True)
class RangedMatrix:
    """[rows, width] numbers of ``dtype`` from byte ``offset`` on, row by row or (Fortran order) column by column."""

    place: RemotePath
    dtype: np.dtype
    offset: int
    shape: tuple[int, int]
    fortran_order: bool

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        indices = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows
        wanted, back = np.unique(indices, return_inverse=True)
        if not len(wanted):
            return np.empty((0, self.shape[1]), self.dtype)
        return (self._columns(wanted) if self.fortran_order else self._rows(wanted))[back]

    def _rows(self, wanted: np.ndarray) -> np.ndarray:
        width = self.shape[1]
        row_bytes = width * self.dtype.itemsize
        result = np.empty((len(wanted), width), self.dtype)
        pieces = _pieces(wanted, 1 + _GAP_BYTES // row_bytes, max(1, _REQUEST_BYTES // row_bytes))
        for group in (pieces[first : first + _REQUESTS] for first in range(0, len(pieces), _REQUESTS)):
            spans = [(int(wanted[low]), int(wanted[high - 1]) + 1) for low, high in group]
            contents = self._fetch([(first * row_bytes, last * row_bytes) for first, last in spans])
            for (low, high), (first, _), content in zip(group, spans, contents, strict=True):
                result[low:high] = content.reshape(-1, width)[wanted[low:high] - first]
        return result

    def _columns(self, wanted: np.ndarray) -> np.ndarray:
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        item, rows = self.dtype.itemsize, self.shape[0]
        result = np.empty((len(wanted), self.shape[1]), self.dtype)
        step = max(1, _REQUESTS * _REQUEST_BYTES // ((last - first) * item))
        for start in range(0, self.shape[1], step):
            columns = range(start, min(start + step, self.shape[1]))
            ranges = [((column * rows + first) * item, (column * rows + last) * item) for column in columns]
            for column, content in zip(columns, self._fetch(ranges), strict=True):
                result[:, column] = content[wanted - first]
        return result

    def _fetch(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        moved = [(self.offset + start, self.offset + stop) for start, stop in ranges]
        contents = self.place.read_ranges(moved)
        for content, (start, stop) in zip(contents, moved, strict=True):
            if len(content) != stop - start:
                raise OSError(f"{len(content)} bytes came where {stop - start} were asked for")
        return [np.frombuffer(content, self.dtype) for content in contents]


def _pieces(wanted: np.ndarray, gap: int, longest: int) -> list[tuple[int, int]]:
    """Positions [low, high) of ascending rows that one request fetches: no gap beyond ``gap``, no longer span."""
    pieces, low = [], 0
    for position in range(1, len(wanted) + 1):
        ends = position == len(wanted)
        if ends or wanted[position] - wanted[position - 1] > gap or wanted[position] - wanted[low] >= longest:
            pieces.append((low, position))
            low = position
    return pieces
