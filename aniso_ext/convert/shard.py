"""One output shard: rows in, stand-ins out, in order and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from aniso_ext.convert.crew import Crew
from aniso_ext.convert.device import CudaMapper, Extent, HostMapper, make_mapper
from aniso_ext.convert.digest import NAME
from aniso_ext.convert.maps import Mapped, RowAligner, RowMap, make_map
from aniso_ext.convert.overlap import HashedOutput, mapped_batches
from aniso_ext.convert.plan import Target
from aniso_ext.convert.rows import NormRange, bad_indices, not_finite, refuse_bad
from aniso_ext.data import EmbeddingWriter, Shard
from aniso_ext.data.shards import unusable
from aniso_ext.data.writer import overflow_error

__all__ = ["RowAligner", "ShardConverter"]


@dataclass
class ShardConverter:
    """Converts shards with one aligner, whose calibration is done; a context manager around them.

    Rows are read, mapped, hashed and written at the same time. What comes out depends neither on ``batch_rows``,
    ``memory`` nor ``threads``, as long as the aligner maps row by row. Buffers and threads stay from shard to shard;
    threads end with the context.

    Args:
        aligner: maps the rows; one that has ``transform_batch`` is called from several threads.
        stored_dtype: of the output.
        batch_rows: rows that are mapped at a time on the CPU; a GPU gets as many as make its copies efficient.
        on_bad: ``fail`` at the first row that is zero or not finite, ``drop`` such rows, or write ``zero`` rows.
        memory: bytes that all batches together may take; None for no limit but that of ``batch_rows``.
        device: ``cpu`` or a CUDA device; by default that of the aligner, else the CPU.
        threads: cores for the map on the CPU; by default what torch uses.
    """

    aligner: RowAligner
    stored_dtype: str
    batch_rows: int
    on_bad: str
    memory: int | None = None
    device: str | None = None
    threads: int | None = None
    _prepared: dict[tuple[int, str], tuple[RowMap, HostMapper | CudaMapper]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _reader: Crew = field(default_factory=lambda: Crew(1, "aniso-read"), init=False, repr=False, compare=False)
    _writers: Crew = field(default_factory=lambda: Crew(2, "aniso-write"), init=False, repr=False, compare=False)

    def __enter__(self) -> ShardConverter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.stop()
        self._writers.stop()
        for _, mapper in self._prepared.values():
            mapper.close()

    def convert(self, target: Target, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one output shard; what the manifest says of it comes back.

        That is its name, rows, bytes, ``xxh3_128`` (:mod:`aniso_ext.convert.digest`), the indices of its bad rows, and
        ``norms``: least and greatest norm of every 64th input row.

        Raises:
            InputError: the device is not there, there is no thread, or ``memory`` is too little.
            DataError: a bad row with on_bad="fail", a file that cannot be read or written; nothing is left behind.
        """
        shard = target.shard
        row_map, mapper = self._prepare(shard)
        dropped: list[int] = []
        norms = NormRange(shard.stored_dtype)
        first_row = 0
        with EmbeddingWriter(
            target.path, target.format, dtype=self.stored_dtype, width=shard.width, overwrite=True, beside=shard
        ) as writer:
            reading = mapped_batches(shard, mapper, self._reader)
            with HashedOutput(writer, self._writers) as output, mapper, closing(reading) as batches:
                for batch in batches:
                    mapped = batch.result()
                    bad = bad_indices(mapped.source_magnitudes, shard.stored_dtype)
                    if self.on_bad == "fail":
                        refuse_bad(shard, mapped.source_magnitudes, bad, first_row)
                    self._check_stand_ins(target, row_map, batch.rows, mapped, bad, first_row, writer.rows)
                    norms.add(batch.rows, bad, first_row)
                    dropped.extend((first_row + bad).tolist())
                    output.write(self._kept(mapped.rows, bad), bad if self.on_bad == "drop" else None)
                    first_row += len(batch.rows)
                    advance(len(batch.rows))
                digest = output.finish()
            if writer.rows == 0:
                reason = f"all {shard.rows} rows are zero or not finite"
                raise unusable(shard.path or shard.name, reason, "remove the shard or pass on_bad='zero'")
        return {
            "shard": target.name,
            "rows": writer.rows,
            "bytes": target.path.stat().st_size,
            NAME: digest,
            "bad_rows": dropped,
            "norms": norms.rounded(),
        }

    def _prepare(self, shard: Shard) -> tuple[RowMap, HostMapper | CudaMapper]:
        """Map and buffers for shards like this one."""
        kind = (shard.width, shard.stored_dtype)
        if kind not in self._prepared:
            device = None
            if hasattr(self.aligner, "transform_batch"):
                device = str(self.device or getattr(self.aligner, "device", None) or "cpu")
            row_map = make_map(self.aligner, shard.stored_dtype, self.stored_dtype, device)
            extent = Extent(shard.width, shard.stored_dtype, self.stored_dtype, self.batch_rows, self.memory)
            self._prepared[kind] = row_map, make_mapper(row_map, extent, device, self.threads)
        row_map, mapper = self._prepared[kind]
        return row_map, mapper.for_rows(shard.rows)

    def _check_stand_ins(
        self,
        target: Target,
        row_map: RowMap,
        rows: np.ndarray,
        mapped: Mapped,
        bad: np.ndarray,
        first_row: int,
        written: int,
    ) -> None:
        """Refuse a finite row whose stand-in is not, or does not fit the stored dtype."""
        wrong = np.setdiff1d(np.flatnonzero(not_finite(mapped.magnitudes, self.stored_dtype)), bad)
        if not len(wrong):
            return
        row = int(wrong[0])
        if row_map.is_finite(rows[row : row + 1]):
            skipped = int((bad < row).sum()) if self.on_bad == "drop" else 0
            raise overflow_error(target.path, written + row - skipped, self.stored_dtype)
        reason = f"row {first_row + row} is finite, but its stand-in is not"
        raise unusable(target.shard.path or target.shard.name, reason, "check the aligner and the scale of the rows")

    def _kept(self, stored: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """Output rows of one batch: bad rows left out, or zero."""
        if not len(bad):
            return stored
        if self.on_bad == "drop":
            return np.delete(stored, bad, axis=0)
        filled = stored.copy()
        filled[bad] = 0
        return filled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}  # buffers stay in their process
