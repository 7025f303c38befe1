"""The three file formats as sinks for rows already in the stored dtype; :class:`EmbeddingWriter` drives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from aniso_ext.data.dtypes import item_bytes
from aniso_ext.data.parquet import COLUMN
from aniso_ext.data.safetensors_file import NAMES, TENSOR_NAME
from aniso_ext.data.shards import little_endian_host
from aniso_ext.errors import InputError

_ROW_GROUP_BYTES = 16 << 20
_SAFETENSORS_HEADER = 248
"""Bytes of JSON, padded with blanks, so that the final number of rows fits where the first one was written."""


class Sink(Protocol):
    """Writes one file format into a temporary file; keeps no rows that it was given."""

    def write(self, rows: np.ndarray) -> None: ...

    def finish(self, rows: int) -> None: ...

    def discard(self) -> None: ...


class _NpySink:
    """Header for no rows first, rewritten at the end: NumPy pads it so that the row count can grow in place."""

    def __init__(self, path: Path, stored_dtype: str, width: int) -> None:
        self._dtype, self._width = np.dtype(stored_dtype), width
        self._file = path.open("r+b")
        self._header(0)

    def _header(self, rows: int) -> None:
        fields = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**fields, "shape": (rows, self._width)})

    def write(self, rows: np.ndarray) -> None:
        self._file.write(rows.data)

    def finish(self, rows: int) -> None:
        self._file.seek(0)
        self._header(rows)
        self._file.close()

    def discard(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
            self._file.close()


class _SafetensorsSink:
    """One tensor named "embeddings"; the header, padded with blanks as the format allows, is rewritten at the end."""

    def __init__(self, path: Path, stored_dtype: str, width: int) -> None:
        if not little_endian_host():
            raise InputError(f"{path}: .safetensors is little-endian and this machine is not: use .npy")
        self._dtype, self._width = stored_dtype, width
        self._file = path.open("r+b")
        self._header(0)

    def _header(self, rows: int) -> None:
        code = next(code for code, name in NAMES.items() if name == self._dtype)
        size = rows * self._width * item_bytes(self._dtype)
        entry = {"dtype": code, "shape": [rows, self._width], "data_offsets": [0, size]}
        text = json.dumps({TENSOR_NAME: entry}, separators=(",", ":")).encode().ljust(_SAFETENSORS_HEADER)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: np.ndarray) -> None:
        self._file.write(rows.data)

    def finish(self, rows: int) -> None:
        self._file.seek(0)
        self._header(rows)
        self._file.close()

    def discard(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses
            self._file.close()


class _ParquetSink:
    """Column "embedding", uncompressed (embeddings do not compress), in row groups of a fixed number of rows."""

    def __init__(self, path: Path, stored_dtype: str, width: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        element = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}[stored_dtype]
        self._width = width
        self._schema = pa.schema([pa.field(COLUMN, pa.list_(pa.field("item", element, False), width), False)])
        self._group_rows = max(1, _ROW_GROUP_BYTES // (width * item_bytes(stored_dtype)))
        self._group = np.empty((0, width), stored_dtype)
        self._filled = 0
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="none", use_dictionary=False, write_statistics=False
        )

    def write(self, rows: np.ndarray) -> None:
        done = 0
        while done < len(rows):
            if not len(self._group):
                self._group = np.empty((self._group_rows, self._width), self._group.dtype)
            part = rows[done : done + self._group_rows - self._filled]
            self._group[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if self._filled == self._group_rows:
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        values = pa.array(self._group[: self._filled].reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(values, type=self._schema.field(0).type)
        self._writer.write_table(pa.Table.from_arrays([lists], schema=self._schema), row_group_size=self._filled)
        self._filled = 0

    def finish(self, rows: int) -> None:
        if self._filled:
            self._flush()
        self._writer.close()

    def discard(self) -> None:
        with suppress(OSError):  # closing writes a footer, which a full disk refuses
            self._writer.close()


SINKS: dict[str, Callable[[Path, str, int], Sink]] = {
    "npy": _NpySink,
    "safetensors": _SafetensorsSink,
    "parquet": _ParquetSink,
}
"""format -> sink(temporary path, stored dtype, width)."""
