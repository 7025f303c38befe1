"""Checks shared by the accumulators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from aniso_ext.errors import InputError

CHUNK_BYTES = 32 << 20
"""Working memory of one update, in bytes of float64: larger batches are taken in chunks of rows."""


def as_batch(batch: Any, columns: int, name: str) -> np.ndarray:
    """The batch as a floating [n, columns] array, without a copy where possible."""
    try:
        array = np.asarray(batch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not an array ({error}): pass a floating [n, {columns}] array") from None
    if array.dtype.kind != "f":
        raise InputError(f"{name} must be floating, got {array.dtype}: convert it, for example with astype('float32')")
    if array.ndim != 2 or array.shape[1] != columns:
        raise InputError(f"{name} must have shape [n, {columns}], got {list(array.shape)}")
    return array


def chunks(batch: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) pieces of the batch that take at most CHUNK_BYTES as float64."""
    rows = max(1, CHUNK_BYTES // (8 * max(1, batch.shape[1])))
    for start in range(0, len(batch), rows):
        yield start, batch[start : start + rows]


def bad_row_error(name: str, good: np.ndarray, seen: int, start: int, reason: str) -> InputError:
    """The error for the first row where ``good`` [n, columns] is False; ``start`` is the offset within the batch."""
    row = start + int(np.flatnonzero(~good.all(axis=1))[0])
    return InputError(
        f"{name}: row {row} of the batch (row {seen + row} of the stream) {reason}: drop or repair it before the update"
    )


def positive_count(value: Any, name: str) -> int:
    """``value`` as a positive int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def check_keys(state: Mapping[str, Any], keys: Iterable[str], kind: str) -> None:
    """Refuse a state that is not the saved state of ``kind``."""
    expected = set(keys)
    if set(state) != expected:
        raise InputError(f"not a {kind} state: keys are {sorted(state)}, expected {sorted(expected)}")


def state_array(state: Mapping[str, Any], key: str, shape: tuple[int, ...], dtype: Any, kind: str) -> np.ndarray:
    """A private copy of one array of a saved state, with its shape checked and its values finite."""
    array = np.array(state[key], dtype=dtype)
    if array.shape != shape:
        raise InputError(f"{kind} state: {key} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        raise InputError(f"{kind} state: {key} has non-finite values")
    return array


def state_count(state: Mapping[str, Any], key: str, kind: str) -> int:
    """A non-negative integer of a saved state; zero-dimensional arrays (as np.savez returns them) are accepted."""
    value = np.asarray(state[key])
    if value.shape != () or value.dtype.kind not in "iu" or int(value) < 0:
        raise InputError(f"{kind} state: {key} must be a non-negative integer, got {state[key]!r}")
    return int(value)
