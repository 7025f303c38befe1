"""Headers of .safetensors files: 8 bytes little-endian length, JSON, then the numbers. Read without loading tensors."""

from __future__ import annotations

import json
from typing import Any

from aniso_ext.data.dtypes import item_bytes
from aniso_ext.data.locations import Location, why
from aniso_ext.data.shards import RawShard, check_matrix, file_size, little_endian_host, unusable
from aniso_ext.errors import DataError

NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
TENSOR_NAME = "embeddings"
_LARGEST_HEADER = 100_000_000


def open_safetensors(path: Location, tensor: str | None = None) -> RawShard:
    """The shard in a .safetensors file: the tensor named ``tensor``, else "embeddings", else the only one.

    Raises:
        DataError: a damaged or truncated file, no such tensor, or one that is not a floating matrix.
    """
    size = file_size(path)
    try:
        header, offset = _read_header(path, size)
    except OSError as error:
        raise unusable(path, f"cannot be read ({why(error)})", "check the permissions") from None
    name = _choose(path, header, tensor)
    entry = header[name]
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
        begin, end = (int(position) for position in entry["data_offsets"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise unusable(path, f"tensor {name!r} has a damaged header entry", "write the file again") from None
    if dtype not in NAMES:
        reason = f"tensor {name!r} holds {dtype}, not floating embeddings"
        raise unusable(path, reason, "store F16, BF16, F32 or F64")
    rows, width = check_matrix(path, f"tensor {name!r}", shape)
    if end - begin != rows * width * item_bytes(NAMES[dtype]) or begin < 0:
        reason = f"tensor {name!r} occupies {end - begin} bytes, which does not fit {list(shape)} of {dtype}"
        raise unusable(path, reason, "write the file again")
    _check_layout(path, header, offset, size)
    if not little_endian_host():
        raise unusable(path, "is little-endian and this machine is not", "convert it to .npy on another machine")
    return RawShard(path.name, path, "safetensors", rows, width, NAMES[dtype], offset + begin)


def _read_header(path: Location, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise unusable(path, "does not start like a .safetensors file, or is truncated", "copy or write it again")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except DataError:
        raise
    except (ValueError, RecursionError):
        raise unusable(path, "has a damaged .safetensors header", "copy or write it again") from None
    if not isinstance(header, dict):
        raise unusable(path, "has a damaged .safetensors header", "copy or write it again")
    header.pop("__metadata__", None)
    return header, 8 + length


def _unique(path: Location, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise unusable(path, f"has a .safetensors header that names {twice!r} twice", "write the file again")
    return entries


def _check_layout(path: Location, header: dict[str, Any], offset: int, size: int) -> None:
    """Tensors must follow each other without overlap or gap and fill the file."""
    try:
        offsets = {name: [int(position) for position in entry["data_offsets"]] for name, entry in header.items()}
        spans = sorted((begin, end, name) for name, (begin, end) in offsets.items())
    except (TypeError, KeyError, ValueError, OverflowError):
        raise unusable(path, "has a damaged header entry", "write the file again") from None
    position = 0
    for begin, end, name in spans:
        if begin != position or end < begin:
            reason = f"tensor {name!r} begins at byte {begin}, but {position} is where the one before it ends"
            raise unusable(path, reason, "write the file again")
        position = end
    if offset + position > size:
        reason = f"is truncated, {size} bytes where the header asks for {offset + position}"
        raise unusable(path, reason, "copy or write it again")
    if offset + position < size:
        reason = f"has {size - offset - position} bytes after the tensors"
        raise unusable(path, reason, "write the file again")


def _choose(path: Location, header: dict[str, Any], tensor: str | None) -> str:
    names = ", ".join(sorted(header)) or "none"
    if tensor is not None:
        if tensor not in header:
            raise unusable(path, f"has no tensor {tensor!r} (it has: {names})", "name one of those as column")
        return tensor
    if TENSOR_NAME in header:
        return TENSOR_NAME
    if len(header) != 1:
        reason = f"has {len(header)} tensors ({names}), none named {TENSOR_NAME!r}"
        raise unusable(path, reason, "name the one to read as column")
    return next(iter(header))
