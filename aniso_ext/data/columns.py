"""Tables with a fixed-size-list column of floats: what parquet and Arrow files have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aniso_ext.data.locations import Location, open_unbuffered, why
from aniso_ext.data.shards import SAMPLED_BYTES, SAMPLED_ROWS, Shard, file_size, unusable

COLUMN = "embedding"
_BLOCK = 4096
_READ_ROWS = 8192
_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def choose_column(path: Location, schema: Any, column: str | None) -> tuple[str, int, str]:
    """Name, width and dtype of the column to read: the named one, else "embedding", else the only one that fits.

    Raises:
        DataError: no such column, or one that is not a fixed-size list of floats.
    """
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
    if schema.names.count(name) > 1:
        raise unusable(path, f"has {schema.names.count(name)} columns named {name!r}", "rename all but one")
    if name not in fitting:
        reason = f"column {name!r} is {schema.field(name).type}, not a fixed-size list of floats"
        raise unusable(path, reason, "cast it to pyarrow.list_(pyarrow.float32(), width)")
    kind = schema.field(name).type
    return name, kind.list_size, _NAMES[str(kind.value_type)]


@dataclass(frozen=True)
class ColumnShard(Shard):
    """Rows of one fixed-size-list column of a table; ``groups`` are the rows of its row groups or record batches."""

    column: str
    groups: tuple[int, ...]

    def schema(self) -> Any:
        """The Arrow schema of the whole table."""
        raise NotImplementedError

    def record_batches(self, start: int, stop: int, batch_rows: int, columns: Sequence[str]) -> Iterator[Any]:
        """Rows start..stop of some columns in order, as Arrow record batches of at most ``batch_rows`` rows."""
        raise NotImplementedError

    def batches(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        for batch in self.record_batches(start, stop, batch_rows, [self.column]):
            yield self._rows(batch.column(0), start)
            start += batch.num_rows

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
        try:
            with open_unbuffered(self.path) as file:
                if size <= SAMPLED_BYTES:
                    digest.update(file.read(size))
                else:
                    for offset in np.linspace(0, size - _BLOCK, SAMPLED_ROWS).astype(np.int64).tolist():
                        file.seek(offset)
                        digest.update(file.read(_BLOCK))
        except OSError as error:
            raise unusable(self.path, f"cannot be read ({why(error)})", "check the permissions") from None
        return digest.hexdigest()


class OtherColumns:
    """The columns of a table beside its embeddings, handed out in step with the rows that are written.

    Args:
        shard: the table they come from.
    """

    def __init__(self, shard: ColumnShard) -> None:
        schema = shard.schema()
        self.shard = shard
        self.schema = schema
        self.names = [name for name in schema.names if name != shard.column]
        self._batches = shard.record_batches(0, shard.rows, _READ_ROWS, self.names)
        self._held: list[Any] = []
        self.position = 0

    def next(self, rows: int, dropped: np.ndarray | None = None) -> Any:
        """The next ``rows`` rows as an Arrow table, without those at the indices ``dropped``; None without columns.

        Raises:
            DataError: there are not as many.
        """
        import pyarrow as pa

        if not self.names:
            self.position += rows
            return None
        have = sum(batch.num_rows for batch in self._held)
        while have < rows:
            batch = next(self._batches, None)
            if batch is None:
                reason = f"has {self.position + have} rows, and row {self.position + rows} was asked for"
                raise unusable(self.shard.path, reason, "do not write to embeddings that are in use")
            self._held.append(batch)
            have += batch.num_rows
        table = pa.Table.from_batches(self._held, schema=self._narrow())
        self._held = table.slice(rows).to_batches()
        self.position += rows
        table = table.slice(0, rows)
        if dropped is not None and len(dropped):
            table = table.take(np.setdiff1d(np.arange(rows), dropped))
        return table

    def close(self) -> None:
        """Let go of the file."""
        self._held = []
        self._batches = iter(())

    def _narrow(self) -> Any:
        import pyarrow as pa

        return pa.schema([self.schema.field(name) for name in self.names])
