"""Writing embeddings: a temporary file in the same folder, fsync, atomic rename. A failure leaves nothing behind."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from aniso_ext.data.dtypes import round_to_bfloat16, stored_name
from aniso_ext.data.folder import FORMATS, format_of
from aniso_ext.data.shards import unusable
from aniso_ext.data.sinks import SINKS, Sink
from aniso_ext.errors import DataError, InputError


class EmbeddingWriter:
    """Write [n, D] batches to one .npy, .parquet or .safetensors file that appears only when it is complete.

    Args:
        path: the file to make; missing parent folders are made too.
        format: ``npy``, ``parquet`` or ``safetensors``; by default from the suffix.
        dtype: stored dtype (NumPy, torch or name; ``bfloat16`` for .safetensors only); by default that of the first
            batch.
        width: D; by default that of the first batch.
        overwrite: replace an existing file (atomically); otherwise it is an error.

    The bytes depend on the rows alone, not on how they were cut into batches.

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
        path: str | os.PathLike[str],
        format: str | None = None,
        *,
        dtype: Any = None,
        width: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.format = format or format_of(self.path)
        if self.format not in FORMATS.values():
            raise InputError(f"{self.path}: cannot tell the format: use one of the suffixes {', '.join(FORMATS)}")
        self.stored_dtype = None if dtype is None else stored_name(dtype)
        self.width = width
        self.overwrite = overwrite
        self.rows = 0
        self._sink: Sink | None = None
        self._temporary: Path | None = None
        self._made: list[Path] = []
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

    def write(self, batch: Any) -> None:
        """Append the rows of a floating [n, D] array; n may be 0."""
        batch = np.asarray(batch)
        if batch.ndim != 2 or batch.dtype.kind != "f" or (self.width is not None and batch.shape[1] != self.width):
            wanted = "D" if self.width is None else self.width
            raise InputError(f"{self.path}: needs floating [n, {wanted}] rows, got {batch.dtype} {list(batch.shape)}")
        if len(batch) == 0:
            return
        if self._sink is None:
            self.width = batch.shape[1]
            self.stored_dtype = self.stored_dtype or stored_name(batch.dtype)
            self._check_dtype()
            self._open()
        assert self._sink is not None
        rows = self._stored(batch)
        try:
            self._sink.write(rows)
        except OSError as error:
            raise self._unwritable(error) from None
        self.rows += len(batch)

    def close(self) -> None:
        """Finish the file and put it in place; a second call does nothing."""
        if self._done:
            return
        if self._sink is None or self._temporary is None:
            raise unusable(self.path, "would have no rows", "write at least one row")
        try:
            self._check_free()
            self._sink.finish(self.rows)
            _sync(self._temporary)
            os.replace(self._temporary, self.path)
            _sync(self.path.parent)
        except OSError as error:
            self.abort()
            raise self._unwritable(error) from None
        except BaseException:
            self.abort()
            raise
        self._sink = self._temporary = None
        self._done = True

    def abort(self) -> None:
        """Remove everything that was made so far; an existing file at the path stays as it was."""
        if self._sink is not None:
            self._sink.discard()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break  # someone else has put a file there
        self._sink, self._temporary, self._made = None, None, []

    def _open(self) -> None:
        try:
            self._made = make_folders(self.path.parent)
            temporary = self.path.with_name(temporary_name(self.path.name))
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            self._temporary = temporary
            self._sink = SINKS[str(self.format)](temporary, str(self.stored_dtype), int(self.width or 0))
        except OSError as error:
            self.abort()
            raise self._unwritable(error) from None

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
            raise unusable(self.path, f"row {row} overflows {self.stored_dtype}", "store a wider dtype")
        return stored

    def _check_free(self) -> None:
        if self.path.is_dir():
            raise unusable(self.path, "is a folder", "pass the path of a file")
        if not self.overwrite and self.path.exists():
            raise unusable(self.path, "exists already", "choose another path or overwrite=True")

    def _check_dtype(self) -> None:
        if self.stored_dtype == "bfloat16" and self.format != "safetensors":
            raise InputError(f"{self.path}: {self.format} cannot hold bfloat16: use .safetensors or another dtype")

    def _unwritable(self, error: OSError) -> DataError:
        return unusable(self.path, f"cannot be written ({error.strerror or error})", "check the space and permissions")


def temporary_name(name: str) -> str:
    """A hidden name that no reader takes for a shard."""
    return f".{name}.{secrets.token_hex(6)}.tmp"


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and its missing parents; the ones made come back, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
    return missing


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
