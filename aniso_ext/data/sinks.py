"""The file formats as sinks for rows already in the stored dtype; :class:`EmbeddingWriter` drives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aniso_ext.data.columns import COLUMN, ColumnShard
from aniso_ext.data.direct_file import DirectFile
from aniso_ext.data.dtypes import item_bytes
from aniso_ext.data.safetensors_file import NAMES, TENSOR_NAME
from aniso_ext.data.shards import little_endian_host
from aniso_ext.errors import InputError

_GROUP_BYTES = 16 << 20
_SAFETENSORS_HEADER = 248
"""Bytes of JSON, padded with blanks, so that the final number of rows fits where the first one was written."""


class Sink(Protocol):
    """Writes one file format into a temporary file; keeps no rows that it was given.

    ``others`` is an Arrow table of columns beside the rows.
    """

    def write(self, rows: np.ndarray, others: Any = None) -> None: ...

    def finish(self, rows: int) -> None: ...

    def discard(self) -> None: ...


class _RowsSink:
    """A header for no rows, the rows as they are, and at the end the header for all of them over the first one."""

    def __init__(self, path: Path, stored_dtype: str, width: int) -> None:
        self._dtype, self._width = stored_dtype, width
        self._file = DirectFile(path)
        self._file.write(self._header(0))

    def _header(self, rows: int) -> bytes:
        """As long for any number of rows."""
        raise NotImplementedError

    def write(self, rows: np.ndarray, others: Any = None) -> None:
        self._file.write(rows.data)

    def finish(self, rows: int) -> None:
        self._file.close(self._header(rows))

    def discard(self) -> None:
        with suppress(OSError):  # closing may bring the error of an earlier write
            self._file.discard()


class _NpySink(_RowsSink):
    """NumPy pads the header so that the row count can grow in place."""

    def _header(self, rows: int) -> bytes:
        content = BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(self._dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(content, {**fields, "shape": (rows, self._width)})
        return content.getvalue()


class _SafetensorsSink(_RowsSink):
    """One tensor named "embeddings"; the header is padded with blanks, as the format allows."""

    def __init__(self, path: Path, stored_dtype: str, width: int) -> None:
        if not little_endian_host():
            raise InputError(f"{path}: .safetensors is little-endian and this machine is not: use .npy")
        super().__init__(path, stored_dtype, width)

    def _header(self, rows: int) -> bytes:
        code = next(code for code, name in NAMES.items() if name == self._dtype)
        size = rows * self._width * item_bytes(self._dtype)
        entry = {"dtype": code, "shape": [rows, self._width], "data_offsets": [0, size]}
        text = json.dumps({TENSOR_NAME: entry}, separators=(",", ":")).encode().ljust(_SAFETENSORS_HEADER)
        return len(text).to_bytes(8, "little") + text


class _TableSink:
    """Column "embedding" in groups of a fixed number of rows, or a copy of a table with its embeddings replaced."""

    def __init__(self, path: Path, stored_dtype: str, width: int, beside: ColumnShard | None) -> None:
        import pyarrow as pa

        element = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}[stored_dtype]
        kind = pa.list_(pa.field("item", element, False), width)
        self._column = COLUMN if beside is None else beside.column
        rows = pa.field(self._column, kind, False)
        others = pa.schema([]) if beside is None else beside.schema()
        fields = [rows if item.name == self._column else item for item in others] or [rows]
        self._schema = pa.schema(fields, metadata=others.metadata)
        self._flat = [item.name for item in fields if item.name != self._column and not pa.types.is_nested(item.type)]
        self._group_rows = max(1, _GROUP_BYTES // (width * item_bytes(stored_dtype)))
        self._group = np.empty((0, width), stored_dtype)
        self._others: list[Any] = []
        self._filled = 0
        self._writer = self._open(path)

    def _open(self, path: Path) -> Any:
        raise NotImplementedError

    def _put(self, table: Any) -> None:
        raise NotImplementedError

    def write(self, rows: np.ndarray, others: Any = None) -> None:
        done = 0
        while done < len(rows):
            if not len(self._group):
                self._group = np.empty((self._group_rows, rows.shape[1]), self._group.dtype)
            part = rows[done : done + self._group_rows - self._filled]
            self._group[self._filled : self._filled + len(part)] = part
            if others is not None:
                self._others.append(others.slice(done, len(part)))
            self._filled += len(part)
            done += len(part)
            if self._filled == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        kind = self._schema.field(self._column).type
        values = pa.array(self._group[: self._filled].reshape(-1))
        columns = {self._column: pa.FixedSizeListArray.from_arrays(values, type=kind)}
        try:
            if self._others:
                # a copy, as the bytes of slices depend on what they were cut from
                others = pa.concat_tables(self._others).take(np.arange(self._filled))
                columns |= {name: others.column(name) for name in others.column_names}
            self._put(pa.Table.from_arrays([columns[name] for name in self._schema.names], schema=self._schema))
        except pa.ArrowException as error:
            raise OSError(f"a column beside the embeddings does not fit: {error}") from None
        self._others, self._filled = [], 0

    def finish(self, rows: int) -> None:
        if self._filled:
            self._flush()
        self._writer.close()

    def discard(self) -> None:
        self._others = []
        with suppress(OSError, ValueError):  # closing writes a footer, which a full disk or a closed file refuses
            self._writer.close()


class _ParquetSink(_TableSink):
    """A row group for each group of rows; the embeddings are stored plainly, as they do not compress."""

    def _open(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetWriter(
            path,
            self._schema,
            compression=dict.fromkeys(self._flat, "snappy") or "none",
            use_dictionary=self._flat or False,
            write_statistics=self._flat or False,
        )

    def _put(self, table: Any) -> None:
        self._writer.write_table(table, row_group_size=table.num_rows)


class _ArrowSink(_TableSink):
    """An Arrow IPC file, a record batch for each group of rows."""

    def _open(self, path: Path) -> Any:
        import pyarrow as pa

        self._file = pa.OSFile(str(path), "wb")
        return pa.ipc.new_file(self._file, self._schema)

    def _put(self, table: Any) -> None:
        self._writer.write_table(table.combine_chunks(), max_chunksize=table.num_rows)

    def finish(self, rows: int) -> None:
        super().finish(rows)
        self._file.close()

    def discard(self) -> None:
        super().discard()
        with suppress(OSError):
            self._file.close()


SINKS: dict[str, Callable[[Path, str, int], Sink]] = {"npy": _NpySink, "safetensors": _SafetensorsSink}
"""format -> sink(temporary path, stored dtype, width)."""

TABLES: dict[str, Callable[[Path, str, int, ColumnShard | None], Sink]] = {"parquet": _ParquetSink, "arrow": _ArrowSink}
"""The same for formats that may have other columns: sink(temporary path, stored dtype, width, shard with them)."""
