"""Writing embeddings: a draft that appears at its place only when it is whole. A failure leaves nothing behind."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import numpy as np

from aniso_ext.data.columns import ColumnShard, OtherColumns
from aniso_ext.data.dtypes import file_dtype, round_to_bfloat16, stored_name
from aniso_ext.data.folder import FORMATS, format_of
from aniso_ext.data.locations import Draft, Location, make_folders, remove_folders, sync, to_location, why
from aniso_ext.data.locations import temporary_name as temporary_name
from aniso_ext.data.shards import Shard, unusable
from aniso_ext.data.sinks import SINKS, TABLES, Sink
from aniso_ext.errors import DataError, InputError


class EmbeddingWriter:
    """Write [n, D] batches to one .npy, .parquet, .safetensors or .arrow file that appears only when it is complete.

    Args:
        path: path or fsspec URL of the file to make; missing parent folders are made too. A remote file is written
            to the folder for temporary files first, and uploaded when it is complete.
        format: ``npy``, ``parquet``, ``safetensors`` or ``arrow``; by default from the suffix.
        dtype: stored dtype (NumPy, torch or name; ``bfloat16`` for .safetensors only); by default that of the first
            batch.
        width: D; by default that of the first batch.
        overwrite: replace an existing file (atomically); otherwise it is an error.
        beside: a parquet or Arrow shard that the rows were made from, one each and in order. A parquet or Arrow file
            then has its columns unchanged, and the rows in place of its embeddings.

    The bytes depend on the rows (and ``beside``) alone, not on how they were cut into batches.

    Raises:
        DataError: the file exists, cannot be written, would have no rows, or a value overflows the stored dtype.
        InputError: a batch that is not a floating [n, D] array, or options that do not fit together.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.npy"
        >>> with EmbeddingWriter(path, dtype="float16") as writer:
        ...     writer.write(np.ones((2, 3), dtype=np.float32))
        >>> np.load(path).dtype, writer.rows
        (dtype('float16'), 2)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Location,
        format: str | None = None,
        *,
        dtype: Any = None,
        width: int | None = None,
        overwrite: bool = False,
        beside: Shard | None = None,
    ) -> None:
        self.path = to_location(path)
        self.format = format or format_of(self.path)
        if self.format not in FORMATS.values():
            raise InputError(f"{self.path}: cannot tell the format: use one of the suffixes {', '.join(FORMATS)}")
        self.stored_dtype = None if dtype is None else stored_name(dtype)
        self.width = width
        self.overwrite = overwrite
        self.rows = 0
        self._sink: Sink | None = None
        self._draft: Draft | None = None
        self._made: list[Location] = []
        self._table = beside if isinstance(beside, ColumnShard) and self.format in TABLES else None
        self._others: OtherColumns | None = None
        self._done = False
        self._check_free()
        self._check_dtype()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, batch: Any, *, dropped: np.ndarray | None = None) -> None:
        """Append the rows of a floating [n, D] array; n may be 0.

        Args:
            batch: the rows.
            dropped: of the n + len(dropped) rows of ``beside`` that come next, the indices of those left out.
        """
        batch = np.asarray(batch)
        if batch.ndim != 2 or batch.dtype.kind != "f" or (self.width is not None and batch.shape[1] != self.width):
            wanted = "D" if self.width is None else self.width
            raise InputError(f"{self.path}: needs floating [n, {wanted}] rows, got {batch.dtype} {list(batch.shape)}")
        if len(batch) == 0 and self._table is None:
            return
        self.width = batch.shape[1]
        self.stored_dtype = self.stored_dtype or stored_name(batch.dtype)
        self._check_dtype()
        self.write_stored(self._stored(batch), dropped=dropped)

    def write_stored(self, rows: np.ndarray, *, dropped: np.ndarray | None = None) -> None:
        """Append C-ordered rows that are in the stored dtype already, bfloat16 as bit patterns (uint16).

        Needs ``dtype`` and ``width``; no value is looked at. The memory of the rows may be used again afterwards.
        """
        assert self.width is not None and self.stored_dtype is not None
        if rows.ndim != 2 or rows.shape[1] != self.width or rows.dtype != file_dtype(self.stored_dtype):
            wanted = f"[n, {self.width}] rows of {file_dtype(self.stored_dtype)}"
            raise InputError(f"{self.path}: needs {wanted}, got {rows.dtype} {list(rows.shape)}")
        others = self._next_others(len(rows), dropped)
        if len(rows) == 0:
            return
        if self._sink is None:
            self._open()
        assert self._sink is not None
        try:
            self._sink.write(rows, others)
        except OSError as error:
            raise self._unwritable(error) from None
        self.rows += len(rows)

    def sync(self) -> None:
        """Bring to disk what was written so far, so that little is left for :meth:`close`.

        May run in another thread than :meth:`write`, but not beside :meth:`close` or :meth:`abort`.
        """
        if self._draft is None:
            return
        try:
            sync(self._draft.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Finish the file and put it in place; a second call does nothing."""
        if self._done:
            return
        if self._sink is None or self._draft is None:
            raise unusable(self.path, "would have no rows", "write at least one row")
        try:
            self._check_free()
            self._check_others()
            self._sink.finish(self.rows)
            self._draft.publish()
        except OSError as error:
            self.abort()
            raise self._unwritable(error) from None
        except BaseException:
            self.abort()
            raise
        self._close_others()
        self._sink = self._draft = None
        self._done = True

    def abort(self) -> None:
        """Remove everything that was made so far; an existing file at the path stays as it was."""
        if self._sink is not None:
            self._sink.discard()
        if self._draft is not None:
            self._draft.discard()
        self._close_others()
        remove_folders(self._made)
        self._sink, self._draft, self._made = None, None, []

    def _open(self) -> None:
        try:
            self._made = make_folders(self.path.parent)
            self._draft = Draft(self.path)
            options = (self._draft.path, str(self.stored_dtype), int(self.width or 0))
            if self.format in TABLES:
                self._sink = TABLES[self.format](*options, self._table)
            else:
                self._sink = SINKS[str(self.format)](*options)
        except OSError as error:
            self.abort()
            raise self._unwritable(error) from None

    def _next_others(self, rows: int, dropped: np.ndarray | None) -> Any:
        if self._table is None:
            return None
        if self._others is None:
            self._others = OtherColumns(self._table)
        return self._others.next(rows + (0 if dropped is None else len(dropped)), dropped)

    def _check_others(self) -> None:
        if self._others is not None and self._others.position != self._others.shard.rows:
            counts = f"{self._others.position} rows were written beside the {self._others.shard.rows} of its table"
            raise InputError(f"{self.path}: {counts}: write one for each, or name the dropped ones")

    def _close_others(self) -> None:
        if self._others is not None:
            self._others.close()

    def _stored(self, batch: np.ndarray) -> np.ndarray:
        if self.stored_dtype == "bfloat16":
            with np.errstate(over="ignore"):
                single = batch.astype(np.float32)
            stored = round_to_bfloat16(single)
            finite = (stored & 0x7F80) != 0x7F80
        else:
            target = np.dtype(self.stored_dtype)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(batch, dtype=target)
            if batch.dtype.itemsize <= target.itemsize:
                return stored
            finite = np.isfinite(stored)
        overflown = ~finite & np.isfinite(batch)
        if overflown.any():
            row = self.rows + int(np.flatnonzero(overflown.any(axis=1))[0])
            raise overflow_error(self.path, row, self.stored_dtype)
        return stored

    def _check_free(self) -> None:
        try:
            is_folder, exists = self.path.is_dir(), not self.overwrite and self.path.exists()
        except OSError as error:
            raise unusable(self.path, f"cannot be reached ({why(error)})", "check the path and permissions") from None
        if is_folder:
            raise unusable(self.path, "is a folder", "pass the path of a file")
        if exists:
            raise unusable(self.path, "exists already", "choose another path or overwrite=True")

    def _check_dtype(self) -> None:
        if self.stored_dtype == "bfloat16" and self.format != "safetensors":
            raise InputError(f"{self.path}: {self.format} cannot hold bfloat16: use .safetensors or another dtype")

    def _unwritable(self, error: OSError) -> DataError:
        return unusable(self.path, f"cannot be written ({why(error)})", "check the space and permissions")


def overflow_error(path: Location, row: int, stored_dtype: str | None) -> DataError:
    """The error of a finite row that does not fit the stored dtype."""
    return unusable(path, f"row {row} overflows {stored_dtype}", "store a wider dtype")
