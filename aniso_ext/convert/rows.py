"""What a conversion looks for in rows: non-finite and zero ones, which no aligner can map, and the range of norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from aniso_ext.data import EmbeddingSet, Shard
from aniso_ext.data.dtypes import widen_bfloat16
from aniso_ext.data.shards import unusable

_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_TILE_BYTES = 512 << 10
"""Rows that are read twice while they are in cache."""
NORM_STEP = 64


def magnitudes(stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The largest magnitude of each row of C-ordered [n, D], as the bits of the number without its sign.

    They are unsigned integers [n] of the size of the numbers, in new memory or in ``out``. Such bits are ordered as the
    magnitudes are, with infinity and NaN above, so that they tell exactly which rows are zero or not finite.
    Floating-point tests are ten times slower in half precision.
    """
    size, width = stored.itemsize, stored.shape[1]
    unsigned = stored.reshape(-1).view(f"u{size}")
    signed = unsigned.view(f"i{size}")
    without_sign = unsigned.dtype.type(2 ** (8 * size - 1) - 1)
    tile = max(1, _TILE_BYTES // (size * width))
    starts = np.arange(0, min(tile, len(stored)) * width, width)
    result = np.empty(len(stored), unsigned.dtype) if out is None else out
    for first in range(0, len(stored), tile):
        rows = min(tile, len(stored) - first)
        span = slice(first * width, (first + rows) * width)
        # the greatest as unsigned is the largest negative number, if there is one; as signed the largest positive one
        negative = np.maximum.reduceat(unsigned[span], starts[:rows]) & without_sign
        positive = np.maximum.reduceat(signed[span], starts[:rows]).view(unsigned.dtype) & without_sign
        np.maximum(negative, positive, out=result[first : first + rows])
    return result


def not_finite(magnitudes: np.ndarray, stored_dtype: str) -> np.ndarray:
    """Which rows hold an infinity or NaN, from their magnitudes."""
    return magnitudes >= _INFINITY[stored_dtype]


def bad_indices(magnitudes: np.ndarray, stored_dtype: str) -> np.ndarray:
    """Ascending indices of rows that are not finite or entirely zero, from their magnitudes."""
    return np.flatnonzero((magnitudes == 0) | not_finite(magnitudes, stored_dtype))


def bad_rows(batch: np.ndarray) -> np.ndarray:
    """Ascending indices of rows of C-ordered [n, D] that are not finite or entirely zero."""
    return bad_indices(magnitudes(batch), batch.dtype.name)


def refuse_bad(shard: Shard, magnitudes: np.ndarray, bad: np.ndarray, first_row: int) -> None:
    """Raise the DataError that names the first bad row, if there is one."""
    if len(bad):
        row = int(bad[0])
        kind = "zero" if magnitudes[row] == 0 else "not finite"
        reason = f"row {first_row + row} is {kind}, which cannot be converted"
        raise unusable(shard.path or shard.name, reason, "repair it, or pass on_bad='drop' or on_bad='zero'")


@dataclass
class NormRange:
    """Least and greatest norm of every 64th row, bad ones left out: tells whether rows are unit vectors."""

    stored_dtype: str
    least: float = field(default=np.inf, init=False)
    greatest: float = field(default=0.0, init=False)

    def add(self, stored: np.ndarray, bad: np.ndarray, first_row: int) -> None:
        """Take in the rows of a shard from ``first_row`` on, as they are stored."""
        chosen = np.arange(-first_row % NORM_STEP, len(stored), NORM_STEP)
        rows = stored[np.setdiff1d(chosen, bad)]
        if len(rows):
            values = widen_bfloat16(rows) if self.stored_dtype == "bfloat16" else rows
            norms = np.linalg.norm(values.astype(np.float64), axis=1)
            self.least, self.greatest = min(self.least, norms.min()), max(self.greatest, norms.max())

    def rounded(self) -> list[float] | None:
        """[least, greatest] to four digits, which do not depend on the machine; None without a row."""
        if self.greatest == 0:
            return None
        return [float(f"{norm:.4g}") for norm in (self.least, self.greatest)]


@dataclass(frozen=True)
class UsableRows:
    """The rows of a set without the bad ones, as a stream: what a corpus mean is taken over."""

    embeddings: EmbeddingSet
    on_bad: str

    @property
    def rows(self) -> int:
        """Rows before bad ones are left out."""
        return self.embeddings.rows

    @property
    def width(self) -> int:
        return self.embeddings.width

    def fingerprint(self) -> str:
        return self.embeddings.fingerprint()

    def iter_batches(self, batch_rows: int = 8192) -> Iterator[np.ndarray]:
        """Usable rows in order; with on_bad="fail" the first bad one is a DataError."""
        for shard in self.embeddings.shards:
            first_row = 0
            for batch in shard.batches(0, shard.rows, batch_rows):
                found = magnitudes(batch)
                bad = bad_indices(found, batch.dtype.name)
                if self.on_bad == "fail":
                    refuse_bad(shard, found, bad, first_row)
                first_row += len(batch)
                usable = np.delete(batch, bad, axis=0) if len(bad) else batch
                if len(usable):
                    yield usable
