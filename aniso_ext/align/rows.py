"""Embeddings as a stream of tensor batches, whatever they were handed in as."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.data import EmbeddingSet

    Embeddings: TypeAlias = np.ndarray | torch.Tensor | str | PathLike[str] | EmbeddingSet

BATCH_ROWS = 8192
FINGERPRINT_ROWS = 4096
UNIT_TOLERANCE = 1e-2
NORM_FLOOR = 1e-12
_NUMPY_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rows:
    """A named set of ``count`` rows of one ``width`` that can be streamed any number of times, in order."""

    name: str
    count: int
    width: int
    _batches: Callable[[int], Iterator[torch.Tensor]]
    _fingerprint: Callable[[], str]

    def batches(self, batch_rows: int = BATCH_ROWS) -> Iterator[torch.Tensor]:
        """[n, D] batches in the stored dtype and on the stored device; n is at most ``batch_rows``."""
        return self._batches(batch_rows)

    def exact_batches(self) -> Iterator[torch.Tensor]:
        """The batches in float64 on the CPU, the form in which everything is fitted."""
        for batch in self._batches(BATCH_ROWS):
            yield batch.to(device="cpu", dtype=torch.float64)

    def fingerprint(self) -> str:
        """Cheap hash of the content, from the shape and a sample of the rows."""
        return self._fingerprint()


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Each row over its Euclidean norm; a zero row stays zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def are_unit(rows: Rows) -> bool:
    """Whether the first rows have norm 1."""
    norms = next(rows.batches(1024)).to(torch.float64).norm(dim=1)
    return bool(((norms - 1).abs() <= UNIT_TOLERANCE).all())


def open_rows(data: Any, name: str) -> Rows:
    """Wrap an array, a tensor, an embedding set or a path.

    Raises:
        InputError: not two-dimensional, or not float16, bfloat16 (tensors), float32 or float64 in native byte order.
        DataError: a path that holds no usable embeddings.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, np.ndarray):
        return _from_array(data, name)
    if isinstance(data, torch.Tensor):
        return _from_tensor(data.detach(), name)
    if isinstance(data, (str, PathLike)):
        from aniso_ext.data import open_embeddings

        data = open_embeddings(data)
    if hasattr(data, "iter_batches") and hasattr(data, "width"):
        return _from_set(data, name)
    raise InputError(
        f"{name} is a {type(data).__name__}: pass a NumPy array, a torch tensor, a path or an EmbeddingSet"
    )


def check_row_count(rank: int, source: Rows, target: Rows) -> None:
    """Refuse a subspace that the rows do not span: the rest of its directions would be arbitrary."""
    spanned = source.count + target.count - 2
    if rank > spanned:
        raise InputError(
            f"{source.count} source and {target.count} target rows vary in at most {spanned} directions, the rank is "
            f"{rank}: lower the rank, or fit on more rows"
        )


def as_tensor(batch: np.ndarray) -> torch.Tensor:
    """A tensor over the array's memory; read-only and unusually strided arrays are copied first."""
    if not (batch.flags.writeable and batch.flags.c_contiguous):
        batch = np.array(batch, order="C")
    return torch.from_numpy(batch)


def _from_array(array: np.ndarray, name: str) -> Rows:
    if array.ndim != 2:
        raise InputError(f"{name} must be [N, D], got shape {list(array.shape)}: one embedding is array[None, :]")
    if array.dtype not in _NUMPY_DTYPES or not array.dtype.isnative:
        raise InputError(f"{name} is {array.dtype.str}: convert it to float16, float32 or float64 in native byte order")

    def batches(batch_rows: int) -> Iterator[torch.Tensor]:
        for start in range(0, len(array), batch_rows):
            yield as_tensor(array[start : start + batch_rows])

    return Rows(name, array.shape[0], array.shape[1], batches, lambda: _hash(array))


def _from_tensor(tensor: torch.Tensor, name: str) -> Rows:
    if tensor.dim() != 2:
        raise InputError(f"{name} must be [N, D], got shape {list(tensor.shape)}: one embedding is tensor[None, :]")
    if tensor.dtype not in _TORCH_DTYPES:
        raise InputError(f"{name} is {tensor.dtype}: convert it to float16, bfloat16, float32 or float64")

    def batches(batch_rows: int) -> Iterator[torch.Tensor]:
        yield from tensor.split(batch_rows)

    return Rows(name, tensor.shape[0], tensor.shape[1], batches, lambda: _hash(tensor))


def _from_set(embeddings: EmbeddingSet, name: str) -> Rows:
    def batches(batch_rows: int) -> Iterator[torch.Tensor]:
        for batch in embeddings.iter_batches(batch_rows):
            yield as_tensor(batch)

    return Rows(name, embeddings.rows, embeddings.width, batches, embeddings.fingerprint)


def _hash(rows: np.ndarray | torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(rows.shape)}:{rows.dtype}".encode())
    step = max(1, -(-len(rows) // FINGERPRINT_ROWS))
    sample = rows[::step]
    if isinstance(sample, torch.Tensor):
        sample = sample.contiguous().view(torch.uint8).cpu().numpy() if sample.numel() else np.empty(0)
    digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()
