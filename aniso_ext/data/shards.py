"""One file (or array) of embeddings: what it holds and how its rows are read."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aniso_ext.data.dtypes import array_dtype, file_dtype, item_bytes, round_to_bfloat16, widen_bfloat16
from aniso_ext.data.locations import Location, open_unbuffered, why
from aniso_ext.data.ranged import RangedMatrix
from aniso_ext.errors import DataError

SAMPLED_ROWS = 256
FEW_ROWS = 1024
"""Rows that are read one by one: a memory map brings in, and counts as ours, up to 2 MiB of the file around each."""
SAMPLED_BYTES = 4 << 20
"""A fingerprint reads the whole shard up to this size, and evenly spaced pieces of a larger one."""


def unusable(path: object, reason: str, remedy: str) -> DataError:
    """The one-line error of a file or folder that cannot be used."""
    text = f"{path}: {reason}: {remedy}"
    return DataError(" ".join(text.split()))


@dataclass(frozen=True)
class Shard:
    """Rows [rows, width] of one file, read in bounded batches.

    ``dtype`` is what batches have, ``stored_dtype`` what the file has; they differ for bfloat16 only (handed out as
    float32). ``path`` is where the file lies, None for an array in memory.
    """

    name: str
    path: Location | None
    format: str
    rows: int
    width: int
    stored_dtype: str

    @property
    def dtype(self) -> np.dtype:
        return array_dtype(self.stored_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers as stored."""
        return self.rows * self.width * item_bytes(self.stored_dtype)

    def batches(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Rows start..stop in order as writable C-ordered arrays of at most ``batch_rows`` rows."""
        raise NotImplementedError

    def stored_batches(
        self, start: int, stop: int, batch_rows: int, memory: Callable[[], np.ndarray] | None = None
    ) -> Iterator[np.ndarray]:
        """What :meth:`batches` gives, as it is in the file: bfloat16 as bit patterns, uint16.

        ``memory()`` hands out a C-ordered array [batch_rows or more, width] for the next batch, which is then a view of
        its first rows. A format whose reader brings its own memory does not ask.
        """
        for batch in self.batches(start, stop, batch_rows):
            yield round_to_bfloat16(batch) if self.stored_dtype == "bfloat16" else batch

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows at ascending or unordered non-negative indices, [len(rows), width]."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of shape, stored dtype and all rows (up to 4 MiB) or 256 evenly spaced ones."""
        digest = hashlib.sha256(f"{self.rows}:{self.width}:{self.stored_dtype}:".encode())
        if self.nbytes <= SAMPLED_BYTES:
            for batch in self.batches(0, self.rows, max(1, self.rows)):
                digest.update(batch.data)
        else:
            count = min(self.rows, SAMPLED_ROWS)
            digest.update(self.take(np.linspace(0, self.rows - 1, count).astype(np.int64)).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class MemoryShard(Shard):
    """An array that is already in memory."""

    array: np.ndarray = field(repr=False, compare=False)

    def batches(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, batch_rows):
            yield np.array(self.array[first : min(first + batch_rows, stop)], order="C")

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.array[rows])


@dataclass(frozen=True)
class RawShard(Shard):
    """A matrix that lies uncompressed in a file (.npy, .safetensors), from byte ``offset`` on.

    Consecutive rows are read with ordinary reads into a fresh array: the pages never count as this process's memory,
    and a file that shrinks meanwhile is an error instead of a bus error. So are a few scattered rows. Many of them, and
    Fortran-ordered files, go through a memory map that lives for one call only, or through range requests.
    """

    offset: int
    fortran_order: bool = False

    def _hand_out(self, stored: np.ndarray) -> np.ndarray:
        return widen_bfloat16(stored) if self.stored_dtype == "bfloat16" else stored

    def _pick(self, rows: Any) -> np.ndarray:
        """A fresh C-ordered array of the rows at a slice or at indices."""
        assert self.path is not None
        order: Literal["C", "F"] = "F" if self.fortran_order else "C"
        shape, dtype = (self.rows, self.width), file_dtype(self.stored_dtype)
        try:
            if not isinstance(self.path, Path):
                ranged = RangedMatrix(self.path, dtype, self.offset, shape, self.fortran_order)
                return np.ascontiguousarray(ranged[rows])
            mapped = np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=shape, order=order)
            return np.array(mapped[rows], order="C")
        except (OSError, ValueError) as error:
            raise unusable(self.path, f"cannot be mapped ({error})", "check the file and its permissions") from None

    def batches(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        for stored in self.stored_batches(start, stop, batch_rows):
            yield self._hand_out(stored)

    def stored_batches(
        self, start: int, stop: int, batch_rows: int, memory: Callable[[], np.ndarray] | None = None
    ) -> Iterator[np.ndarray]:
        if self.fortran_order:
            for first in range(start, stop, batch_rows):
                yield self._pick(slice(first, min(first + batch_rows, stop)))
            return
        dtype = file_dtype(self.stored_dtype)
        with self._opened() as file:
            file.seek(self.offset + start * self.width * dtype.itemsize)
            for first in range(start, stop, batch_rows):
                count = min(batch_rows, stop - first)
                rows = np.empty((count, self.width), dtype) if memory is None else memory()[:count]
                self._fill(file, rows)
                yield rows

    def _opened(self) -> RawIOBase:
        assert self.path is not None
        try:
            return open_unbuffered(self.path)
        except OSError as error:
            raise unusable(self.path, f"cannot be opened ({why(error)})", "check the permissions") from None

    def _fill(self, file: RawIOBase, rows: np.ndarray) -> None:
        buffer = rows.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(buffer):
            try:
                got = file.readinto(buffer[done:])
            except OSError as error:
                raise unusable(self.path, f"cannot be read ({why(error)})", "check the disk or the network") from None
            if not got:
                reason = "became shorter while it was being read"
                raise unusable(self.path, reason, "do not write to embeddings that are in use")
            done += got

    def take(self, rows: np.ndarray) -> np.ndarray:
        if self.fortran_order or len(rows) > FEW_ROWS or not isinstance(self.path, Path):
            return self._hand_out(self._pick(rows))
        found = np.empty((len(rows), self.width), file_dtype(self.stored_dtype))
        with self._opened() as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(self.offset + row * found.strides[0])
                self._fill(file, found[place : place + 1])
        return self._hand_out(found)


def check_matrix(path: Location, what: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and width of a stored shape, which must be two-dimensional and not empty."""
    if len(shape) != 2:
        raise unusable(
            path, f"{what} has {len(shape)} dimensions, shape {list(shape)}", "store one embedding a row, [rows, width]"
        )
    rows, width = (int(size) for size in shape)
    if rows < 1 or width < 1:
        raise unusable(path, f"{what} is empty, shape {list(shape)}", "remove the file or write it again")
    return rows, width


def file_size(path: Location) -> int:
    """Size of a regular file that is not empty."""
    try:
        if not path.exists():
            raise unusable(path, "does not exist", "check the path")
        if not path.is_file():
            raise unusable(path, "is not a regular file", "remove it from the folder or pass a file")
        size = path.stat().st_size
    except OSError as error:
        raise unusable(path, f"cannot be reached ({why(error)})", "check the path and the permissions") from None
    if size == 0:
        raise unusable(path, "is an empty file (0 bytes)", "remove it or write it again")
    return size


def little_endian_host() -> bool:
    """Whether numbers in memory have the byte order of the file formats."""
    return sys.byteorder == "little"
