"""Parquet files with a fixed-size-list column of floats, read row group by row group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.data.shards import SAMPLED_BYTES, SAMPLED_ROWS, Shard, check_matrix, file_size, unusable

COLUMN = "embedding"
_BLOCK = 4096
_READ_ROWS = 8192
_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def open_parquet(path: Path, column: str | None = None) -> ParquetShard:
    """The shard in a parquet file: the named column, else "embedding", else the only fixed-size list of floats.

    Raises:
        DataError: not a parquet file, no such column, lists of varying length, or no rows.
    """
    file_size(path)
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
    name, width, stored_dtype = _choose(path, schema, column)
    rows, width = check_matrix(path, f"column {name!r}", (rows, width))
    return ParquetShard(path.name, path, "parquet", rows, width, stored_dtype, name, groups)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file; what Arrow raises on damaged bytes becomes a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = f"cannot be read as parquet ({str(error)[:100]})"
        raise unusable(path, reason, "copy or write it again, and check the permissions") from None


def _choose(path: Path, schema: Any, column: str | None) -> tuple[str, int, str]:
    import pyarrow as pa

    fitting = [
        item.name for item in schema if pa.types.is_fixed_size_list(item.type) and str(item.type.value_type) in _NAMES
    ]
    name = column if column is not None else COLUMN if COLUMN in schema.names else None
    if name is None:
        if len(fitting) != 1:
            reason = f"has {len(fitting)} columns that are fixed-size lists of floats ({', '.join(schema.names)})"
            raise unusable(path, reason, f"name one of them {COLUMN!r}, or pass column=")
        name = fitting[0]
    if name not in schema.names:
        raise unusable(path, f"has no column {name!r} (it has: {', '.join(schema.names)})", "pass column=")
    if name not in fitting:
        reason = f"column {name!r} is {schema.field(name).type}, not a fixed-size list of floats"
        raise unusable(path, reason, "cast it to pyarrow.list_(pyarrow.float32(), width)")
    kind = schema.field(name).type
    return name, kind.list_size, _NAMES[str(kind.value_type)]


@dataclass(frozen=True)
class ParquetShard(Shard):
    """Rows of one fixed-size-list column; memory is bounded by a batch and Arrow's page buffers."""

    column: str
    groups: tuple[int, ...]

    def batches(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.groups)
        begins = ends - self.groups
        chosen = np.flatnonzero((ends > start) & (begins < stop)).tolist()
        if not chosen:
            return
        assert self.path is not None
        position = int(begins[chosen[0]])
        with _opened(self.path) as file:
            for batch in file.iter_batches(batch_rows, row_groups=chosen, columns=[self.column]):
                rows = self._rows(batch.column(batch.schema.get_field_index(self.column)), position)
                keep = rows[max(0, start - position) : stop - position]
                position += len(rows)
                if len(keep):
                    yield keep
                if position >= stop:
                    return

    def _rows(self, lists: Any, position: int) -> np.ndarray:
        values = lists.flatten()
        if lists.null_count or values.null_count:
            absent = np.asarray(lists.is_null())
            row = position + (int(np.flatnonzero(absent)[0]) if absent.any() else 0)
            where = f"row {row} is null" if absent.any() else f"a row from {row} on has null elements"
            raise unusable(self.path, f"{where} in column {self.column!r}", "drop or fill it")
        return np.array(values.to_numpy(zero_copy_only=False), dtype=self.dtype).reshape(len(lists), self.width)

    def take(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), self.width), self.dtype)
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        ends = np.cumsum(self.groups)
        for first, last in zip(ends - self.groups, ends, strict=True):
            low, high = np.searchsorted(wanted, (first, last))
            if low == high:
                continue
            position = int(wanted[low])
            for batch in self.batches(position, int(wanted[high - 1]) + 1, _READ_ROWS):
                inside = (wanted >= position) & (wanted < position + len(batch))
                result[order[inside]] = batch[wanted[inside] - position]
                position += len(batch)
        return result

    def fingerprint(self) -> str:
        """SHA-256 of shape, stored dtype and the file's bytes (up to 4 MiB) or 256 evenly spaced blocks of them."""
        assert self.path is not None
        digest = hashlib.sha256(f"{self.rows}:{self.width}:{self.stored_dtype}:{self.column}:".encode())
        size = file_size(self.path)
        digest.update(f"{size}:".encode())
        with open(self.path, "rb") as file:
            if size <= SAMPLED_BYTES:
                digest.update(file.read())
            else:
                for offset in np.linspace(0, size - _BLOCK, SAMPLED_ROWS).astype(np.int64).tolist():
                    file.seek(offset)
                    digest.update(file.read(_BLOCK))
        return digest.hexdigest()
