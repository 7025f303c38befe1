"""Where batches are mapped: threads of this machine, or a CUDA device behind pinned buffers.

Both kinds hand out the memory that batches are read into, take batches without waiting for them, and give results back
in order. Memory is ``depth + 1`` batches on the way in and ``depth`` on the way out, whatever the length of a shard.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from aniso_ext.convert.crew import Crew
from aniso_ext.convert.maps import DEVICE_ROWS, ROW_MULTIPLE, ArrayMap, Mapped, RowMap, TensorMap, as_array
from aniso_ext.data.dtypes import file_dtype, item_bytes
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MOST_WORKERS = 16
"""Python threads that map; more would wait for the interpreter, so each takes several cores instead."""
LEAST_SHARE = 1024
"""Rows below which a batch is not cut smaller to occupy every thread."""
CUDA_BATCH_BYTES = 16 << 20
"""Copies of this size run at the rate of the bus."""
CUDA_DEPTH = 3
"""One batch on its way in, one being mapped, one on its way out."""
_WORKING_ROWS = 3
"""Batches in the working dtype that a map may hold besides what goes in and out."""


@dataclass(frozen=True)
class Pending:
    """A batch that was handed over: ``rows`` as read; ``result()`` waits, ``release()`` gives the memory back."""

    rows: np.ndarray
    result: Callable[[], Mapped]
    release: Callable[[], None]


class Mapper(Protocol):
    """Maps the batches of one shard after another; a context manager around each shard, closed after the last."""

    batch_rows: int
    depth: int

    def buffer(self) -> np.ndarray:
        """Memory [batch_rows, D] for the next batch; may be called from another thread than ``submit``."""

    def submit(self, rows: np.ndarray) -> Pending:
        """Begin to map rows as they are stored, whether or not they lie in a :meth:`buffer`."""

    def __enter__(self) -> Mapper: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End the threads."""


@dataclass(frozen=True)
class Extent:
    """What buffers are sized by: the width, the dtypes, the rows wanted at a time and the bytes allowed."""

    width: int
    source_dtype: str
    stored_dtype: str
    batch_rows: int
    memory: int | None = None

    def limited(self, batch_rows: int, depth: int, workers: int, multiple: int = ROW_MULTIPLE) -> int:
        """The rows of a batch with which everything in flight stays within ``memory``.

        Raises:
            InputError: it does not hold the smallest batches.
        """
        if self.memory is None:
            return batch_rows
        source, stored = item_bytes(self.source_dtype), item_bytes(self.stored_dtype)
        numbers = (depth + 1) * source + depth * stored + workers * _WORKING_ROWS * max(4, source, stored)
        fitting = self.memory // (numbers * self.width)
        if fitting < multiple:
            least = multiple * numbers * self.width
            raise InputError(f"memory of {self.memory} bytes is too little: width {self.width} needs {least}")
        return min(batch_rows, fitting // multiple * multiple)


class HostMapper:
    """Maps in threads, each a whole batch on its share of the cores: no thread ever waits for another one's rows."""

    def __init__(self, row_map: RowMap, extent: Extent, threads: int) -> None:
        parallel = isinstance(row_map, TensorMap) and _can_limit_threads()
        self._map, self._extent = row_map, extent
        self._workers = min(threads, MOST_WORKERS) if parallel else 1
        start = partial(_limit_threads, threads // self._workers) if parallel else None
        self._crew = Crew(self._workers, "aniso-map", start)
        self.depth = self._workers + 2
        wanted = extent.batch_rows
        if isinstance(row_map, TensorMap):
            wanted = -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE
        self._most_rows = extent.limited(wanted, self.depth, self._workers)
        self.batch_rows = self._most_rows
        self._sources = _Pool(partial(np.empty, (self._most_rows, extent.width), file_dtype(extent.source_dtype)))
        self._results = _Pool(
            partial(Mapped.empty, self._most_rows, extent.width, extent.source_dtype, extent.stored_dtype)
        )
        self._lent: dict[int, np.ndarray] = {}

    def for_rows(self, rows: int) -> HostMapper:
        """The mapper with batches small enough for every thread to have some of a shard's rows."""
        if isinstance(self._map, TensorMap):
            share = -(-rows // (2 * self._workers * ROW_MULTIPLE)) * ROW_MULTIPLE
            self.batch_rows = min(self._most_rows, max(share, LEAST_SHARE))
        return self

    def buffer(self) -> np.ndarray:
        array = self._sources.take()
        self._lent[address(array)] = array
        return array

    def submit(self, rows: np.ndarray) -> Pending:
        result = self._results.take()
        # in the caller's context, so that its numpy.errstate holds in threads too
        future = self._crew.submit(copy_context().run, self._map, rows, result.part(0, len(rows)))

        def release() -> None:
            if (array := self._lent.pop(address(rows), None)) is not None:
                self._sources.give(array)
            self._results.give(result)

        return Pending(rows, future.result, release)

    def __enter__(self) -> HostMapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._crew.stop()
            self._lent.clear()
            self._sources.reclaim()
            self._results.reclaim()

    def close(self) -> None:
        self._crew.stop()


class _Pool(Generic[T]):
    """Memory that is handed out, given back and handed out again; ``make`` is asked for more where all is in use."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._free: SimpleQueue[T] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._made)

    def take(self) -> T:
        try:
            return self._free.get_nowait()
        except Empty:
            self._made.append(self._make())
            return self._made[-1]

    def give(self, item: T) -> None:
        self._free.put(item)

    def reclaim(self) -> None:
        """Take back everything: nobody works in it any more."""
        self._free = SimpleQueue()
        for item in self._made:
            self._free.put(item)


class CudaRuntime:
    """The calls to CUDA that :class:`CudaMapper` makes."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)

    def stream(self) -> Any:
        import torch

        return torch.cuda.Stream(self.device)

    def event(self) -> Any:
        """An event that is waited for without keeping a core busy."""
        import torch

        return torch.cuda.Event(blocking=True)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(stream)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, pinned: torch.Tensor, result: torch.Tensor) -> None:
        """Begin to copy from the device, on the current stream."""
        pinned.copy_(result, non_blocking=True)

    def used_on(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keep the memory of a tensor from being used again before the stream is done with it."""
        tensor.record_stream(stream)

    def free_bytes(self) -> int:
        import torch

        return torch.cuda.mem_get_info(self.device)[0]


class _Slot:
    """The buffers of one batch on both sides of the bus, and the events between its three steps."""

    def __init__(self, runtime: CudaRuntime, row_map: TensorMap, rows: int, width: int) -> None:
        import torch

        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        source, stored = getattr(torch, row_map.source_dtype), getattr(torch, row_map.stored_dtype)
        self.source = runtime.pinned((rows, width), source)
        self.array = as_array(self.source)
        self.on_device = runtime.on_device((rows, width), source)
        self.results = (
            runtime.pinned((rows, width), stored),
            runtime.pinned((rows,), integers[source.itemsize]),
            runtime.pinned((rows,), integers[stored.itemsize]),
        )
        self.uploaded, self.mapped, self.downloaded = (runtime.event() for _ in range(3))


class CudaMapper:
    """Maps on a CUDA device: copies in, the map and copies out run in a stream each, several batches at a time.

    The host waits for nothing but the result that is asked for. A slot is used again only after its result was taken,
    so that everything done in it is over by then.
    """

    def __init__(self, row_map: TensorMap, extent: Extent, runtime: CudaRuntime) -> None:
        self._map, self._extent, self._runtime = row_map, extent, runtime
        self.depth = CUDA_DEPTH
        self._most_rows = self.batch_rows = self._fitting_rows()
        self._upload, self._compute, self._download = (runtime.stream() for _ in range(3))
        self._slots: dict[int, _Slot] = {}
        self._free: SimpleQueue[_Slot] = SimpleQueue()

    def _fitting_rows(self) -> int:
        """Batches that are worth a copy, within the host memory allowed and a quarter of the free device memory."""
        extent = self._extent
        row_bytes = extent.width * item_bytes(extent.source_dtype)
        wanted = max(extent.batch_rows, CUDA_BATCH_BYTES // row_bytes)
        on_device = self._runtime.free_bytes() // 4 // (extent.width * 8 * (2 * self.depth + 1 + 2 * _WORKING_ROWS))
        wanted = max(min(wanted, on_device) // DEVICE_ROWS, 1) * DEVICE_ROWS
        return extent.limited(wanted, self.depth, 0, DEVICE_ROWS)

    def for_rows(self, rows: int) -> CudaMapper:
        """The mapper with batches small enough for copies and map to overlap in a short shard as well."""
        share = -(-rows // (2 * self.depth * DEVICE_ROWS)) * DEVICE_ROWS
        self.batch_rows = min(self._most_rows, share)
        return self

    def buffer(self) -> np.ndarray:
        return self._take().array

    def _take(self) -> _Slot:
        try:
            return self._free.get_nowait()
        except Empty:
            slot = _Slot(self._runtime, self._map, self._most_rows, self._extent.width)
            self._slots[address(slot.array)] = slot
            return slot

    def submit(self, rows: np.ndarray) -> Pending:
        slot = self._slots.get(address(rows))
        if slot is None:
            slot = self._take()
            slot.array[: len(rows)] = rows
        count = len(rows)
        whole = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
        slot.array[count:whole] = rows[-1:]
        self._enqueue(slot, count, whole)

        def result() -> Mapped:
            slot.downloaded.synchronize()
            return Mapped(*(as_array(pinned)[:count] for pinned in slot.results))

        return Pending(rows, result, lambda: self._free.put(slot))

    def _enqueue(self, slot: _Slot, count: int, whole: int) -> None:
        runtime = self._runtime
        with runtime.on(self._upload):
            slot.on_device[:whole].copy_(slot.source[:whole], non_blocking=True)
            slot.uploaded.record(self._upload)
        with runtime.on(self._compute):
            self._compute.wait_event(slot.uploaded)
            results = self._map.apply(slot.on_device[:whole])
            slot.mapped.record(self._compute)
        with runtime.on(self._download):
            self._download.wait_event(slot.mapped)
            for pinned, result in zip(slot.results, results, strict=True):
                runtime.copy(pinned[:count], result[:count])
                runtime.used_on(result, self._download)
            slot.downloaded.record(self._download)

    def __enter__(self) -> CudaMapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._upload, self._compute, self._download):
            stream.synchronize()
        if kind is not None:
            self._free = SimpleQueue()
            for slot in self._slots.values():
                self._free.put(slot)

    def close(self) -> None:
        """There are no threads."""


def make_mapper(row_map: RowMap, extent: Extent, device: str | None, threads: int | None) -> HostMapper | CudaMapper:
    """The mapper for a device, ``cpu`` or a CUDA one; ``threads`` are cores for the CPU, by default those of torch.

    Raises:
        InputError: no such device, no thread, or ``memory`` is too little.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if isinstance(row_map, ArrayMap) or device is None:
        return HostMapper(row_map, extent, 1)
    check_device(device)
    if device.startswith("cuda"):
        return CudaMapper(row_map, extent, CudaRuntime(device))
    import torch

    return HostMapper(row_map, extent, torch.get_num_threads() if threads is None else threads)


def check_device(device: str) -> None:
    """Raise the InputError of a device that is not there."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            seen = f"the last one that is visible is cuda:{count - 1}" if count else "no CUDA device is visible"
            raise InputError(f"device {device!r} is not there: {seen}")


def address(rows: np.ndarray) -> int:
    """Where the memory of an array begins."""
    return int(rows.__array_interface__["data"][0])


def _can_limit_threads() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "omp_set_num_threads")
    except (OSError, TypeError):
        return False


def _limit_threads(count: int) -> None:
    """Operators called by this thread use ``count`` threads: OpenMP's own setting, as torch's holds for the process."""
    import torch

    torch.get_num_threads()  # a thread's first call makes torch set its own number, so that comes before ours
    ctypes.CDLL(None).omp_set_num_threads(count)
