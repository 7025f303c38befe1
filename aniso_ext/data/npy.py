"""Headers of .npy files, parsed by ``numpy.lib.format``; the numbers themselves are read by :class:`RawShard`."""

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np

from aniso_ext.data.dtypes import STORED_DTYPES
from aniso_ext.data.locations import Location, why
from aniso_ext.data.shards import RawShard, check_matrix, file_size, unusable

_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_npy(path: Location) -> RawShard:
    """The shard in a .npy file, with its header and size checked.

    Raises:
        DataError: not a .npy file, a pickled, integer or wrong-endian array, not two-dimensional, empty or truncated.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = _read_header(path, file)
            offset = file.tell()
    except OSError as error:
        raise unusable(path, f"cannot be read ({why(error)})", "check the permissions") from None
    stored_dtype = _check_dtype(path, dtype)
    rows, width = check_matrix(path, "the array", shape)
    expected = offset + rows * width * dtype.itemsize
    if size < expected:
        reason = f"is truncated, {size} bytes where the header asks for {expected}"
        raise unusable(path, reason, "copy or write it again")
    if size > expected:
        reason = f"has {size - expected} bytes after the {expected} that the header describes"
        raise unusable(path, reason, "write it again with numpy.save")
    return RawShard(path.name, path, "npy", rows, width, stored_dtype, offset, fortran_order and rows > 1 and width > 1)


def _read_header(path: Location, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise unusable(path, "does not start like a .npy file", "write it with numpy.save") from None
    if version not in _READERS:
        reason = f"has .npy format version {version[0]}.{version[1]}, which is for structured arrays"
        raise unusable(path, reason, "store a plain float array with numpy.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _READERS[version](file)
    except Exception as error:  # NumPy lets through whatever its tokenizer and literal parser raise
        reason = f"has a damaged .npy header ({str(error)[:80]})"
        raise unusable(path, reason, "copy or write it again") from None


def _check_dtype(path: Location, dtype: np.dtype) -> str:
    if dtype.hasobject:
        reason = "holds pickled Python objects, which are never loaded"
        raise unusable(path, reason, "store a float array with numpy.save(..., allow_pickle=False)")
    if dtype.kind == "f" and not dtype.isnative:
        reason = f"has the wrong byte order (dtype {dtype.str})"
        raise unusable(path, reason, "convert it once with array.astype(array.dtype.newbyteorder('='))")
    if dtype.name not in STORED_DTYPES:
        reason = f"holds {dtype.name}, not floating embeddings"
        raise unusable(path, reason, "store float16, float32 or float64 (bfloat16: use .safetensors)")
    return dtype.name
