"""Element types of embeddings: how they are named, stored and computed with."""

from __future__ import annotations

from typing import Any

import numpy as np

from aniso_ext.errors import InputError

STORED_DTYPES = ("float16", "float32", "float64", "bfloat16")


def array_dtype(stored_dtype: str) -> np.dtype:
    """The dtype in which rows of a stored dtype are handed out: float32 for bfloat16, which NumPy does not have."""
    return np.dtype(np.float32 if stored_dtype == "bfloat16" else stored_dtype)


def file_dtype(stored_dtype: str) -> np.dtype:
    """The NumPy dtype of the numbers in a file: uint16, bit patterns, for bfloat16."""
    return np.dtype(np.uint16 if stored_dtype == "bfloat16" else stored_dtype)


def item_bytes(stored_dtype: str) -> int:
    """Bytes of one stored number."""
    return file_dtype(stored_dtype).itemsize


def stored_name(dtype: Any) -> str:
    """float16, float32, float64 or bfloat16, from a name, a NumPy dtype or a torch dtype.

    Raises:
        InputError: any other element type.
    """
    text = str(dtype).removeprefix("torch.")
    if text in STORED_DTYPES:
        return text
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = text
    if name not in STORED_DTYPES:
        raise InputError(f"embeddings are stored as {', '.join(STORED_DTYPES)}, not {dtype!r}: choose one of them")
    return name


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns (uint16); exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) of float32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet_nan = (bits >> 16) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
