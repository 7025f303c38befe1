"""Rows that no aligner can map: non-finite or zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aniso_ext.data import EmbeddingSet, Shard
from aniso_ext.data.shards import unusable


def bad_rows(batch: np.ndarray) -> np.ndarray:
    """Ascending indices of rows of [n, D] that are not finite or entirely zero."""
    good = np.isfinite(batch).all(axis=1) & batch.any(axis=1)
    return np.flatnonzero(~good)


def refuse_bad(shard: Shard, batch: np.ndarray, bad: np.ndarray, first_row: int) -> None:
    """Raise the DataError that names the first bad row, if there is one."""
    if len(bad):
        row = int(bad[0])
        kind = "zero" if np.isfinite(batch[row]).all() else "not finite"
        reason = f"row {first_row + row} is {kind}, which cannot be converted"
        raise unusable(shard.path or shard.name, reason, "repair it, or pass on_bad='drop' or on_bad='zero'")


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
                bad = bad_rows(batch)
                if self.on_bad == "fail":
                    refuse_bad(shard, batch, bad, first_row)
                first_row += len(batch)
                usable = np.delete(batch, bad, axis=0) if len(bad) else batch
                if len(usable):
                    yield usable
