"""One output shard: rows in, stand-ins out, in order and in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aniso_ext.convert.plan import Target
from aniso_ext.convert.rows import bad_rows, refuse_bad
from aniso_ext.data import EmbeddingWriter
from aniso_ext.data.dtypes import array_dtype
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError


class RowAligner(Protocol):
    """What a conversion needs of an aligner; :class:`aniso_ext.align.Aligner` has it."""

    @property
    def width(self) -> int:
        """D."""

    def fingerprint(self) -> str:
        """Hash of everything that decides what ``transform`` returns."""

    def transform(self, source: Any, *, calibration: str | None = ...) -> Any:
        """Stand-ins [n, D] for rows [n, D], same dtype; with ``fitted`` each result depends on its own row alone."""

    def calibrated(self, source: Any, *, calibration: str | None = ...) -> RowAligner:
        """The aligner whose corpus mean comes from ``source``, an object with ``width`` and ``iter_batches``."""


@dataclass(frozen=True)
class ShardConverter:
    """Converts shards with one aligner, whose calibration is done."""

    aligner: RowAligner
    stored_dtype: str
    batch_rows: int
    on_bad: str
    memory: int | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)
    threads: int | None = field(default=None, kw_only=True)

    def convert(self, target: Target, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one output shard; what the manifest says of it comes back.

        Raises:
            DataError: a bad row with on_bad="fail", a file that cannot be read or written; nothing is left behind.
        """
        shard = target.shard
        dropped: list[int] = []
        first_row = 0
        with EmbeddingWriter(
            target.path, target.format, dtype=self.stored_dtype, width=shard.width, overwrite=True
        ) as writer:
            for batch in shard.batches(0, shard.rows, self.batch_rows):
                bad = bad_rows(batch)
                if self.on_bad == "fail":
                    refuse_bad(shard, batch, bad, first_row)
                dropped.extend((first_row + bad).tolist())
                writer.write(self._map(target, batch, bad, first_row))
                first_row += len(batch)
                advance(len(batch))
            if writer.rows == 0:
                reason = f"all {shard.rows} rows are zero or not finite"
                raise unusable(shard.path or shard.name, reason, "remove the shard or pass on_bad='zero'")
        return {
            "shard": target.name,
            "rows": writer.rows,
            "bytes": target.path.stat().st_size,
            "sha256": _sha256(target.path),
            "bad_rows": dropped,
        }

    def _map(self, target: Target, batch: np.ndarray, bad: np.ndarray, first_row: int) -> np.ndarray:
        """Output rows of one batch: bad rows left out, or zero."""
        wider = np.promote_types(batch.dtype, array_dtype(self.stored_dtype))
        usable = np.delete(batch, bad, axis=0) if len(bad) else batch
        mapped = usable.astype(wider, copy=False)
        if len(mapped):
            mapped = np.asarray(self.aligner.transform(mapped, calibration="fitted"))
        if mapped.shape != usable.shape:
            shapes = f"{list(usable.shape)} into {list(mapped.shape)}"
            raise InputError(f"the aligner turned {shapes}: it must keep the shape")
        finite = np.isfinite(mapped).all(axis=1)
        if not finite.all():
            good = np.setdiff1d(np.arange(len(batch)), bad)
            row = first_row + int(good[~finite][0])
            reason = f"row {row} is finite, but its stand-in is not"
            raise unusable(
                target.shard.path or target.shard.name, reason, "check the aligner and the scale of the rows"
            )
        if self.on_bad == "drop" or not len(bad):
            return mapped
        filled = np.zeros(batch.shape, mapped.dtype)
        filled[np.setdiff1d(np.arange(len(batch)), bad)] = mapped
        return filled


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
