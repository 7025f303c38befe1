"""Parquet files with a fixed-size-list column of floats, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.data.columns import ColumnShard, choose_column
from aniso_ext.data.locations import Location
from aniso_ext.data.shards import check_matrix, file_size, unusable


def open_parquet(path: Location, column: str | None = None) -> ParquetShard:
    """The shard in a parquet file: the named column, else "embedding", else the only fixed-size list of floats.

    Raises:
        DataError: not a parquet file, no such column, lists of varying length, or no rows.
    """
    file_size(path)
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
    name, width, stored_dtype = choose_column(path, schema, column)
    rows, width = check_matrix(path, f"column {name!r}", (rows, width))
    return ParquetShard(path.name, path, "parquet", rows, width, stored_dtype, name, groups)


@contextmanager
def _opened(path: Location) -> Iterator[Any]:
    """The open file; what Arrow raises on damaged bytes becomes a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = path if isinstance(path, Path) else pa.PythonFile(path.open("rb"), mode="r")
        with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = f"cannot be read as parquet ({str(error)[:100]})"
        raise unusable(path, reason, "copy or write it again, and check the permissions") from None


@dataclass(frozen=True)
class ParquetShard(ColumnShard):
    """Rows of one column of a parquet file; memory is bounded by a batch and Arrow's page buffers."""

    def schema(self) -> Any:
        assert self.path is not None
        with _opened(self.path) as file:
            return file.schema_arrow

    def record_batches(self, start: int, stop: int, batch_rows: int, columns: Sequence[str]) -> Iterator[Any]:
        ends = np.cumsum(self.groups)
        begins = ends - self.groups
        chosen = np.flatnonzero((ends > start) & (begins < stop)).tolist()
        if not chosen:
            return
        assert self.path is not None
        position = int(begins[chosen[0]])
        with _opened(self.path) as file:
            for batch in file.iter_batches(batch_rows, row_groups=chosen, columns=list(columns)):
                skipped = max(0, start - position)
                keep = batch.slice(skipped, max(0, stop - position - skipped))
                position += batch.num_rows
                if keep.num_rows:
                    yield keep.select(list(columns))
                if position >= stop:
                    return
