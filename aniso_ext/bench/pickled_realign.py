"""ReAlign as it is run without this package: one process, NumPy in float64, four passes over pickled records.

The yardstick of `aniso bench convert`. It reads the pickles that :func:`write_records` has made, and no name that is
not in them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def write_records(path: Path, rows: np.ndarray, first: int) -> None:
    """One dict a row: its number, a caption and its float32 embedding."""
    records = [
        {"id": first + number, "caption": f"caption {first + number}", "embedding": row}
        for number, row in enumerate(rows.astype(np.float32))
    ]
    _write(path, records)


def realign_records(paths: Sequence[Path], folder: Path, target_mean: np.ndarray, target_trace: float) -> int:
    """Write the stand-ins of the records to ``folder``, file by file; how many there are.

    1. the mean of all rows; 2. their trace and so the scale; 3. rows about the target's mean, normalised, and their
    centroid; 4. the same rows with the centroid moved to the target's mean, normalised, and written.
    """
    total, count = np.zeros(len(target_mean)), 0
    for _, rows in _read(paths):
        total += rows.sum(axis=0)
        count += len(rows)
    mean = total / count

    trace = sum(float(((rows - mean) ** 2).sum()) for _, rows in _read(paths)) / count
    scale = (target_trace / trace) ** 0.5

    def anchored(rows: np.ndarray) -> np.ndarray:
        return _normalized(scale * (rows - mean) + target_mean)

    centroid = sum((anchored(rows).sum(axis=0) for _, rows in _read(paths)), np.zeros(len(mean))) / count

    for path, (records, rows) in zip(paths, _read(paths), strict=True):
        moved = _normalized(anchored(rows) - centroid + target_mean).astype(np.float32)
        _write(folder / path.name, [{**record, "embedding": row} for record, row in zip(records, moved, strict=True)])
    return count


def read_embeddings(path: Path) -> np.ndarray:
    """The rows [n, D] of one file of records, float64."""
    return next(iter(_read([path])))[1]


def _read(paths: Iterable[Path]) -> Iterable[tuple[list[Record], np.ndarray]]:
    for path in paths:
        with path.open("rb") as file:
            records = _ArraysOnly(file).load()
        yield records, np.stack([record["embedding"] for record in records]).astype(np.float64)


class _ArraysOnly(pickle.Unpickler):
    """What NumPy's own pickles of arrays name, and nothing else; asked once a file, so that it costs no time."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy.core", "numpy._core"), name) not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array: make the benchmark's records anew")
        return super().find_class(module, name)


_ARRAY_NAMES = {("numpy._core.numeric", "_frombuffer"), ("numpy._core.multiarray", "_reconstruct")} | {
    ("numpy", name) for name in ("ndarray", "dtype")
}


def _write(path: Path, records: list[Record]) -> None:
    with path.open("wb") as file:
        pickle.dump(records, file, protocol=pickle.HIGHEST_PROTOCOL)


def _normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
