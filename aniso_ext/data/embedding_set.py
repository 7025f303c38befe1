"""Embedding sets: one or many shards seen as one matrix [N, D]."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aniso_ext.data.arrow import open_arrow
from aniso_ext.data.dtypes import STORED_DTYPES
from aniso_ext.data.folder import find_shards, format_of
from aniso_ext.data.locations import Location, is_place, to_location
from aniso_ext.data.npy import open_npy
from aniso_ext.data.parquet import open_parquet
from aniso_ext.data.safetensors_file import open_safetensors
from aniso_ext.data.shards import MemoryShard, Shard, unusable
from aniso_ext.errors import InputError


def open_embeddings(source: Any, *, kind: str | None = None, column: str | None = None) -> EmbeddingSet:
    """Open a file, a folder of shards, or wrap an array as an embedding set; only headers are read.

    Args:
        source: path or fsspec URL of a .npy, .parquet, .safetensors or .arrow file or of a folder of them (natural
            order of names), a floating [N, D] NumPy array or torch tensor, or an :class:`EmbeddingSet`, which is
            returned as it is.
        kind: ``image`` or ``text`` selects ``img_emb`` or ``text_emb`` of a clip-retrieval folder.
        column: column of a table, or safetensors tensor; by default "embedding" / "embeddings", else the only one
            that fits.

    Raises:
        DataError: one line that names the file, the reason and the remedy; widths and dtypes must agree across shards.
        InputError: an array that is not a floating matrix, or an unknown kind.

    Example:
        >>> import numpy as np
        >>> embeddings = open_embeddings(np.eye(4, dtype=np.float32))
        >>> embeddings.rows, embeddings.width, [len(batch) for batch in embeddings.iter_batches(3)]
        (4, 4, [3, 1])
    """
    if isinstance(source, EmbeddingSet):
        return source
    if not is_place(source):
        return EmbeddingSet([_wrap(source)])
    found = find_shards(to_location(source), kind)
    return EmbeddingSet([_open_file(path, column) for path in found.files], folder=found.folder, half=found.half)


def _open_file(path: Location, column: str | None) -> Shard:
    match format_of(path):
        case "npy":
            return open_npy(path)
        case "safetensors":
            return open_safetensors(path, column)
        case "arrow":
            return open_arrow(path, column)
        case _:
            return open_parquet(path, column)


def _wrap(array: Any) -> Shard:
    torch = sys.modules.get("torch")
    stored_dtype = None
    if torch is not None and isinstance(array, torch.Tensor):
        if array.dtype == torch.bfloat16:
            stored_dtype, array = "bfloat16", array.float()
        array = array.detach().cpu().numpy()
    if not isinstance(array, np.ndarray):
        raise InputError(f"embeddings must be a path, a NumPy array or a torch tensor, got {type(array).__name__}")
    if array.ndim != 2:
        raise InputError(f"embeddings must be [N, D], got shape {list(array.shape)}: one embedding is array[None, :]")
    if array.dtype.name not in STORED_DTYPES or not array.dtype.isnative:
        raise InputError(f"embeddings are {array.dtype.str}: convert them to native float16, float32 or float64")
    rows, width = array.shape
    return MemoryShard("embeddings.npy", None, "memory", rows, width, stored_dtype or array.dtype.name, array)


class EmbeddingSet:
    """Rows [N, D] spread over shards in file order; opened by :func:`open_embeddings`.

    Attributes:
        shards: the :class:`Shard` of each file.
        rows, width: N and D.
        dtype: NumPy dtype of everything that is read.
        stored_dtype: what the files hold; "bfloat16" is handed out as float32.
        folder: the folder that was opened, None for a file or an array.
        half: ``img_emb`` or ``text_emb`` if ``folder`` has the clip-retrieval layout, else None.
    """

    def __init__(self, shards: Sequence[Shard], *, folder: Location | None = None, half: str | None = None) -> None:
        self.shards = tuple(shards)
        self.folder, self.half = folder, half
        first = self.shards[0]
        for shard in self.shards[1:]:
            for what in ("width", "stored_dtype"):
                ours, theirs = getattr(shard, what), getattr(first, what)
                if ours != theirs:
                    reason = f"{what.replace('_', ' ')} is {ours}, but {first.name} has {theirs}"
                    raise unusable(shard.path, reason, "keep embeddings of one kind in a folder")
        self.width = first.width
        self.dtype = first.dtype
        self.stored_dtype = first.stored_dtype
        self._ends = np.cumsum([shard.rows for shard in self.shards])
        self.rows = int(self._ends[-1])

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"EmbeddingSet(rows={self.rows}, width={self.width}, {self.stored_dtype}, shards={len(self.shards)})"

    def iter_batches(self, batch_rows: int = 8192) -> Iterator[np.ndarray]:
        """All rows in order, [n, D] with n at most ``batch_rows``; a batch never spans two shards.

        Every batch is a fresh writable C-ordered array; memory is one batch.
        """
        if isinstance(batch_rows, bool) or not isinstance(batch_rows, (int, np.integer)) or batch_rows < 1:
            raise InputError(f"batch_rows must be a positive integer, got {batch_rows!r}")
        yield from self.iter_range(0, self.rows, int(batch_rows))

    def iter_range(self, start: int, stop: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Rows start..stop in order, as :meth:`iter_batches` gives all."""
        for shard, end in zip(self.shards, self._ends, strict=True):
            offset = int(end) - shard.rows
            first, last = max(start - offset, 0), min(stop - offset, shard.rows)
            if first < last:
                yield from shard.batches(first, last, batch_rows)

    def read(self, rows: Any) -> np.ndarray:
        """A copy of chosen rows, [n, D].

        Args:
            rows: a slice, a sequence of indices (negative ones count from the end), or a boolean mask of length N.

        Raises:
            InputError: an index out of range, or a mask of another length.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            if step == 1:
                return self._read_range(start, max(start, stop))
            rows = np.arange(start, stop, step)
        return self._gather(self._indices(rows))

    def numpy(self) -> np.ndarray:
        """All rows in memory, [N, D]."""
        return self._read_range(0, self.rows)

    def fingerprint(self) -> str:
        """SHA-256 that tells sets apart: shapes, dtypes and sampled content of all shards, not their names.

        Shards up to 4 MiB count in full, larger ones by 256 evenly spaced rows (parquet: blocks): it recognises a set,
        it does not protect against someone who edits single rows.
        """
        digest = hashlib.sha256(f"{self.width}:{self.stored_dtype}".encode())
        for shard in self.shards:
            digest.update(bytes.fromhex(shard.fingerprint()))
        return digest.hexdigest()

    def _read_range(self, start: int, stop: int) -> np.ndarray:
        result = np.empty((stop - start, self.width), self.dtype)
        done = 0
        for batch in self.iter_range(start, stop, max(1, (8 << 20) // (8 * self.width))):
            result[done : done + len(batch)] = batch
            done += len(batch)
        return result

    def _indices(self, rows: Any) -> np.ndarray:
        indices = np.asarray(rows)
        if indices.dtype == bool:
            if indices.shape != (self.rows,):
                raise InputError(f"a row mask must have length {self.rows}, got shape {list(indices.shape)}")
            return np.flatnonzero(indices)
        if indices.size == 0:
            return np.empty(0, np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise InputError("rows must be a slice, a vector of integers or a boolean mask")
        outside = (indices < -self.rows) | (indices >= self.rows)
        if outside.any():
            raise InputError(f"row {int(indices[outside][0])} is out of range: there are {self.rows} rows")
        return np.where(indices < 0, indices + self.rows, indices).astype(np.int64)

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        result = np.empty((len(indices), self.width), self.dtype)
        owner = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            shard = self.shards[number]
            result[mine] = shard.take(indices[mine] - (int(self._ends[number]) - shard.rows))
        return result
