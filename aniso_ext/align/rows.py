"""Embeddings as a stream of tensor batches, whatever they were handed in as."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from aniso_ext.align.processes import gather, gather_states, world
from aniso_ext.errors import AnisoError, InputError

if TYPE_CHECKING:
    from aniso_ext.data import EmbeddingSet
    from aniso_ext.stats import Moments, PhaseMoments, RadiusSketch

    Accumulator = TypeVar("Accumulator", Moments, PhaseMoments, RadiusSketch)
    Embeddings: TypeAlias = np.ndarray | torch.Tensor | str | PathLike[str] | EmbeddingSet

BATCH_ROWS = 8192
FINGERPRINT_ROWS = 4096
UNIT_TOLERANCE = 1e-2
NORM_FLOOR = 1e-12
_NUMPY_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rows:
    """A named set of ``count`` rows of one ``width`` that can be streamed any number of times, in order.

    Shared rows are streamed by all processes of torch.distributed together: each gets a contiguous share of them, and
    what it has found there is merged with what the others found, in order of rank, so that all hold the same.
    """

    name: str
    count: int
    width: int
    _batches: Callable[[int, int, int], Iterator[torch.Tensor]]
    """Called with the first row, the last + 1 and the most rows of a batch."""
    _fingerprint: Callable[[], str]
    processes: tuple[int, int] = (0, 1)
    """Rank of this process, and how many share the rows."""

    def shared(self) -> Rows:
        """These rows, shared among all processes.

        Raises:
            InputError: there are more processes than rows.
        """
        processes = world()
        if processes[1] > self.count:
            raise InputError(f"{self.name} has {self.count} rows for {processes[1]} processes: start fewer of them")
        return replace(self, processes=processes)

    @property
    def share(self) -> tuple[int, int]:
        """First and last + 1 of the rows that this process streams."""
        rank, processes = self.processes
        return rank * self.count // processes, (rank + 1) * self.count // processes

    def batches(self, batch_rows: int = BATCH_ROWS) -> Iterator[torch.Tensor]:
        """[n, D] batches of this process's share, as stored (dtype and device); n is at most ``batch_rows``."""
        return self._batches(*self.share, batch_rows)

    def exact_batches(self, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """The batches in float64, the form in which everything is fitted."""
        for batch in self.batches():
            yield batch.to(device).to(torch.float64)

    def mean(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Mean [D] over all rows of what ``function`` makes of them, batch by float64 batch."""
        total, count = sum_of(map(function, self.exact_batches()))
        return self.total(total) / self.total(torch.tensor(count))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A pass that ends well for all processes or for none: the error of one is raised by all."""
        error: AnisoError | None = None
        try:
            yield
        except AnisoError as found:
            error = found
        text = "" if error is None else str(error)
        others = [] if self.processes[1] == 1 else gather(torch.tensor(list(text.encode()), dtype=torch.uint8))
        if error is not None:
            raise error
        for message in others:
            if len(message):
                raise InputError(bytes(message.tolist()).decode())

    def merged(self, own: Accumulator) -> Accumulator:
        """An accumulator of everything that those of all processes have seen; ``own`` if there is one process."""
        if self.processes[1] == 1:
            return own
        total: Accumulator | None = None
        for state in gather_states(own.state_dict()):
            found: Accumulator = type(own).from_state_dict(state)
            total = found if total is None else total.merge(found)
        assert total is not None
        return total

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] that all processes have picked from their shares, in the order of the set."""
        return own if self.processes[1] == 1 else torch.cat(gather(own))

    def total(self, own: torch.Tensor) -> torch.Tensor:
        """Sum of the tensors of all processes."""
        return own if self.processes[1] == 1 else torch.stack(gather(own[None])).sum(dim=0)[0]

    def agreed(self, own: torch.Tensor) -> torch.Tensor:
        """The tensor of process 0; what all compute alike may differ in the last bit from machine to machine."""
        return own if self.processes[1] == 1 else gather(own if self.processes[0] == 0 else own[:0])[0]

    def fingerprint(self) -> str:
        """Cheap hash of the content, from the shape and a sample of the rows."""
        return self._fingerprint()


def sum_of(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Sum [D] of the rows of batches, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total = total + batch.sum(dim=0)
        count += len(batch)
    return total, count


def mean_of(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean [D] of the rows of float64 batches."""
    total, count = sum_of(batches)
    return total / count


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Each row over its Euclidean norm; a zero row stays zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def normalize_(rows: torch.Tensor) -> torch.Tensor:
    """:func:`normalize` in place."""
    return rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min_(NORM_FLOOR))


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

    def batches(first: int, last: int, batch_rows: int) -> Iterator[torch.Tensor]:
        for start in range(first, last, batch_rows):
            yield as_tensor(array[start : min(start + batch_rows, last)])

    return Rows(name, array.shape[0], array.shape[1], batches, lambda: _hash(array))


def _from_tensor(tensor: torch.Tensor, name: str) -> Rows:
    if tensor.dim() != 2:
        raise InputError(f"{name} must be [N, D], got shape {list(tensor.shape)}: one embedding is tensor[None, :]")
    if tensor.dtype not in _TORCH_DTYPES:
        raise InputError(f"{name} is {tensor.dtype}: convert it to float16, bfloat16, float32 or float64")

    def batches(first: int, last: int, batch_rows: int) -> Iterator[torch.Tensor]:
        yield from tensor[first:last].split(batch_rows)

    return Rows(name, tensor.shape[0], tensor.shape[1], batches, lambda: _hash(tensor))


def _from_set(embeddings: EmbeddingSet, name: str) -> Rows:
    def batches(first: int, last: int, batch_rows: int) -> Iterator[torch.Tensor]:
        whole = (first, last) == (0, embeddings.rows)
        found = embeddings.iter_batches(batch_rows) if whole else embeddings.iter_range(first, last, batch_rows)
        for batch in found:
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
