"""Arrow IPC files (also called Feather) with a fixed-size-list column of floats, read record batch by record batch.

A local file is mapped, so that memory is bounded whatever the size of its record batches. A remote one is fetched batch
by batch; as the format does not list their rows, opening it fetches all of them once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aniso_ext.data.columns import ColumnShard, choose_column
from aniso_ext.data.locations import Location
from aniso_ext.data.shards import check_matrix, file_size, unusable


def open_arrow(path: Location, column: str | None = None) -> ArrowShard:
    """The shard in an Arrow file: the named column, else "embedding", else the only fixed-size list of floats.

    Raises:
        DataError: not an Arrow file, no such column, lists of varying length, or no rows.
    """
    file_size(path)
    with _opened(path) as file:
        name, width, stored_dtype = choose_column(path, file.schema, column)
        groups = tuple(file.get_batch(i).num_rows for i in range(file.num_record_batches))
    rows, width = check_matrix(path, f"column {name!r}", (sum(groups), width))
    return ArrowShard(path.name, path, "arrow", rows, width, stored_dtype, name, groups)


@contextmanager
def _opened(path: Location) -> Iterator[Any]:
    """The open file; what Arrow raises on damaged bytes becomes a DataError."""
    import pyarrow as pa

    try:
        mapped = isinstance(path, Path)
        with pa.memory_map(str(path)) if mapped else pa.PythonFile(path.open("rb"), mode="r") as source:
            yield pa.ipc.open_file(source)
    except (pa.ArrowException, OSError) as error:
        reason = f"cannot be read as an Arrow file ({str(error)[:100]})"
        raise unusable(path, reason, "write it with pyarrow.ipc.new_file, and check the permissions") from None


@dataclass(frozen=True)
class ArrowShard(ColumnShard):
    """Rows of one column of an Arrow file."""

    def schema(self) -> Any:
        assert self.path is not None
        with _opened(self.path) as file:
            return file.schema

    def record_batches(self, start: int, stop: int, batch_rows: int, columns: Sequence[str]) -> Iterator[Any]:
        assert self.path is not None
        position = 0
        with _opened(self.path) as file:
            for number, rows in enumerate(self.groups):
                first, last = max(start - position, 0), min(stop - position, rows)
                position += rows
                if first >= last:
                    continue
                batch = file.get_batch(number).select(list(columns))
                batch.validate()
                for low in range(first, last, batch_rows):
                    yield batch.slice(low, min(batch_rows, last - low))
