"""Reading embeddings for measurement: arrays, tensors, opened sets or paths become float64 rows, checked on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.diagnostics.streams import Matrix

CPU = torch.device("cpu")
BATCH_ROWS = 8192


class Rows:
    """A named [N, D] matrix of floating numbers that is read in pieces, by default as float64 on the CPU."""

    def __init__(self, name: str, source: Any, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise InputError(f"{name} must be [N, D], got shape {list(shape)}: pass one embedding a row")
        self.name = name
        self.count, self.width = int(shape[0]), int(shape[1])
        if self.width == 0:
            raise InputError(f"{name} has width 0: pass embeddings")
        self._source = source

    def read(
        self, rows: slice | np.ndarray, device: torch.device = CPU, dtype: torch.dtype | None = torch.float64
    ) -> torch.Tensor:
        """The rows of a slice or of an index array, [n, D] contiguous; a non-finite one is an :class:`InputError`.

        ``dtype=None`` leaves them in the type that they are stored in.
        """
        source = self._source
        if isinstance(source, torch.Tensor):
            piece = source[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(source.device)].detach()
        else:
            array = np.asarray(source[rows] if isinstance(source, np.ndarray) else source.read(rows))
            piece = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        values = piece.to(device).to(piece.dtype if dtype is None else dtype).contiguous()
        self.check_finite(values, rows)
        return values

    @property
    def in_memory(self) -> bool:
        """Whether the rows are an array or a tensor, possibly mapped from a file, and not a set that is read."""
        return isinstance(self._source, (np.ndarray, torch.Tensor))

    def fill(self, rows: slice | np.ndarray, out: torch.Tensor) -> None:
        """Copy the rows into ``out`` [n, D], of their own dtype and on the CPU, without a look at them."""
        source = self._source
        if isinstance(source, torch.Tensor):
            out.copy_(source[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(source.device)].detach())
        else:
            np.copyto(out.numpy(), np.asarray(source[rows] if isinstance(source, np.ndarray) else source.read(rows)))

    def batches(self, batch_rows: int = BATCH_ROWS, *, device: torch.device = CPU) -> Iterator[torch.Tensor]:
        """All rows in order as float64, at most ``batch_rows`` at a time."""
        for start in range(0, self.count, batch_rows):
            yield self.read(slice(start, min(start + batch_rows, self.count)), device)

    def resident(self, device: torch.device) -> torch.Tensor | None:
        """The tensor itself, all rows checked, where it lies on that device already."""
        source = self._source
        if not isinstance(source, torch.Tensor) or not source.is_contiguous() or source.device.type != device.type:
            return None
        if device.index is not None and source.device.index != device.index:
            return None
        for start in range(0, self.count, BATCH_ROWS):
            self.check_finite(source[start : start + BATCH_ROWS], slice(start, self.count))
        return source.detach()

    def check_finite(self, values: torch.Tensor, rows: slice | np.ndarray) -> None:
        """Raises an :class:`InputError` with the place of the first of these ``values`` that is not finite."""
        bad = (~torch.isfinite(values.double().square().sum(dim=1))).nonzero().flatten()
        if bad.numel():
            first = int(bad[0])
            row = (rows.start or 0) + first if isinstance(rows, slice) else int(rows[first])
            raise InputError(
                f"{self.name} has non-finite values (or squares that overflow) in {bad.numel()} of {values.shape[0]} "
                f"rows read, first in row {row}: drop or mend them on all sides of the pairs"
            )


def open_rows(name: str, value: Any) -> Rows:
    """Wrap one argument.

    ``value`` is a NumPy array or torch tensor [N, D] of a floating dtype, an opened embedding set, or a path that
    ``aniso_ext.data.open_embeddings`` understands.

    Raises:
        InputError: it is none of these, is not two-dimensional, or is not of a floating dtype.
    """
    if isinstance(value, (str, os.PathLike)):
        from aniso_ext.data import open_embeddings

        value = open_embeddings(value)
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise InputError(f"{name} is {value.dtype}: convert it to float16, bfloat16, float32 or float64")
        return Rows(name, value, value.shape)
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or value.dtype.itemsize > 8:
            raise InputError(f"{name} is {value.dtype}: convert it to float16, float32 or float64")
        return Rows(name, value, value.shape)
    if all(hasattr(value, attribute) for attribute in ("read", "rows", "width")):
        return Rows(name, value, (value.rows, value.width))
    raise InputError(
        f"{name} is a {type(value).__name__}: pass a NumPy array, a torch tensor, an opened embedding set or a path"
    )


def open_paired(*, minimum: int, **values: Any) -> tuple[Rows, ...]:
    """Wrap arguments whose rows belong together, and check that they do.

    Raises:
        InputError: rows or widths differ, or there are fewer than ``minimum`` rows.
    """
    opened = tuple(open_rows(name, value) for name, value in values.items())
    first = opened[0]
    for other in opened[1:]:
        if other.width != first.width:
            raise InputError(
                f"{first.name} has width {first.width} but {other.name} has width {other.width}: "
                "all must come from one embedding space"
            )
        if other.count != first.count:
            raise InputError(
                f"{first.name} has {first.count} rows but {other.name} has {other.count}: "
                "row i of each must belong to the same pair"
            )
    if first.count < minimum:
        raise InputError(f"{first.count} pairs are too few: at least {minimum} are needed")
    return opened


def choose_rows(count: int, max_rows: int | None, seed: int) -> np.ndarray | None:
    """Sorted indices of a seeded uniform sample without replacement, or None when all rows are taken."""
    if max_rows is None or count <= max_rows:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, size=max_rows, replace=False))


def choose_device(device: torch.device | str | None, *values: Any) -> torch.device:
    """Where work is done: the ``device`` asked for, else that of CUDA inputs, else a GPU if there is one, else the CPU.

    Raises:
        InputError: it is no device of this machine, or neither the CPU nor CUDA.
    """
    if device is None:
        placed = [value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda]
        return placed[0] if placed else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device = {device!r} is unknown: pass 'cpu' or 'cuda'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device = {device!r} is not supported: pass 'cpu' or 'cuda'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device = {device!r}, but torch finds no CUDA device: pass device='cpu'")
    return chosen


def load(rows: Rows, chosen: np.ndarray | None, device: torch.device = CPU) -> torch.Tensor:
    """The chosen rows (None: all of them) in memory, [n, D]: float64 on the CPU, elsewhere in their own dtype."""
    if device.type == "cpu":
        return rows.read(slice(0, rows.count) if chosen is None else chosen)
    return load_stored(rows, chosen, device)


def load_stored(rows: Rows, chosen: np.ndarray | None, device: torch.device) -> torch.Tensor:
    """The chosen rows [n, D] on the device in their own dtype, read in pieces; without a copy where they are there."""
    if chosen is None and (resident := rows.resident(device)) is not None:
        return resident
    count = rows.count if chosen is None else len(chosen)
    loaded: torch.Tensor | None = None
    for start in range(0, count, BATCH_ROWS):
        stop = min(start + BATCH_ROWS, count)
        batch = rows.read(slice(start, stop) if chosen is None else chosen[start:stop], device, None)
        if loaded is None:
            loaded = torch.empty(count, rows.width, dtype=batch.dtype, device=device)
        loaded[start:stop] = batch
    assert loaded is not None
    return loaded


def pieces(*rows: Matrix) -> Iterator[tuple[torch.Tensor, ...]]:
    """Matching float64 pieces of matrices with the same number of rows."""
    for parts in zip(*(matrix.split(BATCH_ROWS) for matrix in rows), strict=True):
        yield tuple(part.double() for part in parts)
