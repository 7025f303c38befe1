"""From the id of a sample to the row of its embedding."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.data.clip_retrieval import METADATA
from aniso_ext.data.folder import natural_key
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.data.json_lines import read_json_lines


def open_index(source: Any) -> EmbeddingIndex:
    """An index from files of ids in the order of the embeddings.

    Args:
        source: an :class:`EmbeddingIndex`, a sequence of ids, a ``.jsonl`` file with ``id`` in each line, a
            ``.parquet`` file or a folder of them with the column ``id``, a clip-retrieval folder, or one of its halves.

    Raises:
        DataError: no ids there, or an id twice.

    Example:
        >>> open_index(["b", "a"]).rows(["a"]).tolist()
        [1]
    """
    if isinstance(source, EmbeddingIndex):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return EmbeddingIndex(source)
    path = Path(source)
    return EmbeddingIndex(_ids(path), name=str(path))


class EmbeddingIndex:
    """Rows by id, 16 bytes for each: sorted 64-bit hashes of the ids, and the rows in that order.

    Two of a million ids share a hash with a chance of 3e-8, and are refused as the same id.

    Args:
        ids: one for each row.
        name: of where they come from, for messages.

    Raises:
        DataError: an id comes twice.
    """

    def __init__(self, ids: Iterable[Any], *, name: str = "the index") -> None:
        self.name = name
        hashes = np.fromiter((_hash(str(value)) for value in ids), np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(same):
            first, second = sorted(int(row) for row in self._order[same[0] : same[0] + 2])
            raise DataError(f"{name}: rows {first} and {second} have the same id: give each embedding an id of its own")

    def __len__(self) -> int:
        return len(self._hashes)

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """The row of each id, int64; -1 where there is none."""
        wanted = np.fromiter((_hash(value) for value in ids), np.uint64)
        if not len(self._hashes):
            return np.full(len(wanted), -1)
        place = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[place] == wanted, self._order[place], -1)

    def fingerprint(self) -> str:
        """SHA-256 of the hashes and rows."""
        return hashlib.sha256(self._hashes.tobytes() + self._order.tobytes()).hexdigest()


def _hash(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def _ids(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path of the index")
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in read_json_lines(path):
            if "id" not in line:
                raise DataError(f"{path}: line {number} has no id: list the ids in the order of the embeddings")
            yield line["id"]
        return
    for file in _tables(path):
        yield from _column(file)


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".parquet":
            raise InputError(f"{path}: an index is a .jsonl or .parquet file with ids, or a folder with metadata")
        return [path]
    for folder in (path / METADATA, path.parent / METADATA, path):
        files = sorted(folder.glob("[!.]*.parquet"), key=natural_key) if folder.is_dir() else []
        if files:
            return files
    raise DataError(
        f"{path} has no metadata with ids: pass an index, a .jsonl or .parquet file with an id for each embedding"
    )


def _column(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if "id" not in file.schema_arrow.names:
                raise DataError(f"{path} has no column id (it has {', '.join(file.schema_arrow.names)}): add one")
            for batch in file.iter_batches(columns=["id"]):
                yield from batch.column(0).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet ({str(error)[:100]}): copy or write it again") from None
