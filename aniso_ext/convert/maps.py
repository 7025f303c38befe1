"""How an aligner maps one batch of rows as they are stored to stand-ins as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aniso_ext.convert.rows import bad_indices, magnitudes
from aniso_ext.data.dtypes import array_dtype, file_dtype, item_bytes, round_to_bfloat16, widen_bfloat16
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import torch

ROW_MULTIPLE = 32
"""Products of fewer rows take other paths through their libraries, which round differently."""
DEVICE_ROWS = 4096
"""Rows of every product on a device, counted from the first of a shard: libraries choose how to add, and so how to
round, by the number of rows and by the place of a row among them."""


class RowAligner(Protocol):
    """What a conversion needs of an aligner; :class:`aniso_ext.align.Aligner` has it."""

    @property
    def width(self) -> int:
        """D."""

    def fingerprint(self) -> str:
        """Hash of everything that decides what ``transform`` returns."""

    def transform(self, source: Any, *, calibration: str | None = ...) -> Any:
        """Stand-ins [n, D] for rows [n, D], same dtype; with ``fitted`` each result depends on its own row alone."""

    def calibrated(self, source: Any, *, calibration: str | None = ...) -> RowAligner:
        """The aligner whose corpus mean comes from ``source``, an object with ``width`` and ``iter_batches``."""


@dataclass(frozen=True)
class Mapped:
    """Stand-ins of a batch as they are stored, with the :func:`magnitudes` of the rows and of the stand-ins.

    What stands in the place of a bad row means nothing.
    """

    rows: np.ndarray
    source_magnitudes: np.ndarray
    magnitudes: np.ndarray

    @classmethod
    def empty(cls, rows: int, width: int, source_dtype: str, stored_dtype: str) -> Mapped:
        """Memory for the results of a batch."""
        bits = (np.empty(rows, f"u{item_bytes(dtype)}") for dtype in (source_dtype, stored_dtype))
        return cls(np.empty((rows, width), file_dtype(stored_dtype)), *bits)

    def part(self, start: int, stop: int) -> Mapped:
        """The memory of some of the rows."""
        return Mapped(self.rows[start:stop], self.source_magnitudes[start:stop], self.magnitudes[start:stop])


class ArrayMap:
    """An aligner that is known by ``transform`` on arrays alone; it never sees a bad row."""

    def __init__(self, aligner: RowAligner, source_dtype: str, stored_dtype: str) -> None:
        self.source_dtype, self.stored_dtype = source_dtype, stored_dtype
        self._aligner = aligner
        self._working = np.promote_types(array_dtype(source_dtype), array_dtype(stored_dtype))

    def __call__(self, stored: np.ndarray, result: Mapped) -> Mapped:
        """Stand-ins of the rows, written to ``result``."""
        bad = bad_indices(magnitudes(stored, result.source_magnitudes), self.source_dtype)
        rows = self._widened(stored)
        if len(bad) == len(rows):
            mapped = np.zeros_like(rows)
        else:
            rows[bad] = rows[np.setdiff1d(np.arange(len(rows)), bad)[0]]
            mapped = self._transformed(rows)
        if self.stored_dtype == "bfloat16":
            result.rows[:] = round_to_bfloat16(mapped)
        else:
            with np.errstate(over="ignore"):
                result.rows[:] = mapped
        magnitudes(result.rows, result.magnitudes)
        return result

    def is_finite(self, stored: np.ndarray) -> bool:
        """Whether the stand-ins of a few rows are finite before they are rounded to the stored dtype."""
        return bool(np.isfinite(self._transformed(self._widened(stored))).all())

    def _widened(self, stored: np.ndarray) -> np.ndarray:
        rows = widen_bfloat16(stored) if self.source_dtype == "bfloat16" else stored
        return rows.astype(self._working, copy=False)

    def _transformed(self, rows: np.ndarray) -> np.ndarray:
        mapped = np.asarray(self._aligner.transform(rows, calibration="fitted"))
        _check_shape(rows.shape, mapped.shape)
        return mapped


class TensorMap:
    """An aligner that maps tensors by ``transform_batch``, on any device and in several threads at a time.

    Rows that are stored as they were read are mapped in that dtype, others in one that holds both.
    """

    def __init__(self, aligner: Any, source_dtype: str, stored_dtype: str) -> None:
        import torch

        self.source_dtype, self.stored_dtype = source_dtype, stored_dtype
        self._transform: Callable[[torch.Tensor], torch.Tensor] = aligner.transform_batch
        self._transform_into: Callable[[torch.Tensor, torch.Tensor], None] | None = getattr(
            aligner, "transform_into", None
        )
        self._maps_rows_apart: Callable[[torch.Tensor], bool] = getattr(
            aligner, "maps_rows_apart", lambda batch: False
        )
        self._source: torch.dtype = getattr(torch, source_dtype)
        self._stored: torch.dtype = getattr(torch, stored_dtype)
        self._tile_bytes: int | None = getattr(aligner, "tile_bytes", None)
        wider = np.promote_types(array_dtype(source_dtype), array_dtype(stored_dtype))
        self._working = self._source if source_dtype == stored_dtype else getattr(torch, wider.name)

    def __call__(self, stored: np.ndarray, result: Mapped) -> Mapped:
        """Stand-ins of the rows, written to ``result``.

        Nothing that is allocated here outlives the call: a block that another thread frees later would keep the memory
        before and after it apart, and every batch might take new memory.
        """
        size = self.tile_rows(stored.shape[1]) or len(stored)
        for first in range(0, len(stored), size):
            self._map(stored[first : first + size], result.part(first, first + size))
        return result

    def tile_rows(self, width: int) -> int | None:
        """Rows that are mapped at a time on the CPU; None for all of a batch."""
        if self._tile_bytes is None:
            return None
        rows = self._tile_bytes // (width * max(4, self._working.itemsize))
        return max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE

    def _map(self, stored: np.ndarray, result: Mapped) -> None:
        magnitudes(stored, result.source_magnitudes)
        target = as_tensor(result.rows, self._stored)
        whole = len(stored) // ROW_MULTIPLE * ROW_MULTIPLE if self._transform_into is not None else 0
        if whole:
            self._map_into(as_tensor(stored[:whole], self._source), target[:whole])
        if whole < len(stored):
            mapped = self._transformed(as_tensor(padded(stored[whole:]), self._source))
            target[whole:].copy_(mapped[: len(stored) - whole])
        magnitudes(result.rows, result.magnitudes)

    def _map_into(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """The rows to the memory of their stand-ins, by way of the working dtype where that is another one."""
        assert self._transform_into is not None
        rows = stored if stored.dtype == self._working else _empty(stored.shape, self._working).copy_(stored)
        mapped = target if target.dtype == self._working else _empty(target.shape, self._working)
        self._transform_into(rows, mapped)
        if mapped is not target:
            target.copy_(mapped)

    def apply(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stand-ins, and magnitudes of rows and stand-ins, on the device of the rows.

        A row's stand-in is the same to the bit in all batches that begin at a multiple of DEVICE_ROWS.
        """
        import torch

        rows = stored.to(self._working)
        if self._maps_rows_apart(rows):
            mapped = self._transformed(rows).to(self._stored)
        else:
            blocks = (self._transformed(_whole(block))[: len(block)] for block in rows.split(DEVICE_ROWS))
            mapped = torch.cat([block.to(self._stored) for block in blocks])
        return mapped, _tensor_magnitudes(stored), _tensor_magnitudes(mapped)

    def is_finite(self, stored: np.ndarray) -> bool:
        """Whether the stand-ins of a few rows are finite before they are rounded to the stored dtype."""
        return bool(self._transformed(as_tensor(stored, self._source)).isfinite().all())

    def _transformed(self, stored: torch.Tensor) -> torch.Tensor:
        mapped = self._transform(stored.to(self._working))
        _check_shape(tuple(stored.shape), tuple(mapped.shape))
        return mapped


RowMap = ArrayMap | TensorMap


def make_map(aligner: RowAligner, source_dtype: str, stored_dtype: str, device: str | None) -> RowMap:
    """The map of an aligner whose calibration is done; ``device`` is where rows are handed to it, None for arrays."""
    if device is None or not hasattr(aligner, "transform_batch"):
        return ArrayMap(aligner, source_dtype, stored_dtype)
    return TensorMap(_on_device(aligner, device), source_dtype, stored_dtype)


def _on_device(aligner: Any, device: str) -> Any:
    """The aligner with its fitted constants, mapping rows where they are."""
    import copy

    calibrated = aligner.calibrated(np.empty((0, aligner.width), np.float32), calibration="fitted")
    if getattr(calibrated, "device", None) is None:
        return calibrated
    twin = copy.copy(calibrated)
    twin.device = device
    return twin


def padded(stored: np.ndarray) -> np.ndarray:
    """The rows, the last one repeated until ROW_MULTIPLE divides their number."""
    missing = -len(stored) % ROW_MULTIPLE
    return np.concatenate((stored, np.repeat(stored[-1:], missing, axis=0))) if missing else stored


def _whole(block: torch.Tensor) -> torch.Tensor:
    """DEVICE_ROWS rows: those of the block, the last one repeated."""
    import torch

    missing = DEVICE_ROWS - len(block)
    return torch.cat((block, block[-1:].expand(missing, -1))) if missing else block


def as_tensor(stored: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over the memory of rows as they are stored."""
    import torch

    if dtype == torch.bfloat16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of NumPy's, whose blocks are used again.

    Those of torch are aligned, and such a block that was freed is not found for the next one of its size by the C
    library (glibc before 2.38): each time that something else comes to lie behind it, the process grows by a block.
    """
    import torch

    return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """An array over the memory of a tensor, as it is stored."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _tensor_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """:func:`aniso_ext.convert.rows.magnitudes` of a tensor, as signed integers."""
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return (rows.contiguous().view(integers) & torch.iinfo(integers).max).amax(dim=1)


def _check_shape(rows: tuple[int, ...], mapped: tuple[int, ...]) -> None:
    if mapped != rows:
        raise InputError(f"the aligner turned {list(rows)} into {list(mapped)}: it must keep the shape")
