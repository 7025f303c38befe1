"""The CUDA mapper: order of its steps against a stand-in for CUDA that computes late, and its rows on a real device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aniso_ext.align import AnisoAlign, TrainingOptions
from aniso_ext.convert import convert_embeddings, verify_conversion
from aniso_ext.convert import device as device_module
from aniso_ext.convert.crew import Crew
from aniso_ext.convert.device import CudaMapper, Extent, Mapper
from aniso_ext.convert.maps import TensorMap
from aniso_ext.convert.overlap import mapped_batches
from aniso_ext.convert.plan import Target
from aniso_ext.convert.rows import magnitudes
from aniso_ext.convert.shard import ShardConverter
from aniso_ext.data import EmbeddingWriter, open_embeddings
from aniso_ext.errors import DataError

WIDTH = 16


class LateStream:
    """Work that runs only when somebody waits for it, in the order in which it was given."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], None]] = deque()

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.work.popleft()()

    def wait_event(self, event: LateEvent) -> None:
        waited, round = event, event.round
        self.work.append(lambda: waited.wait_for(round))

    def synchronize(self) -> None:
        self.run_until(lambda: not self.work)


class LateEvent:
    """Counts how often it was recorded and how often the stream has come to a record."""

    def __init__(self) -> None:
        self.round = self.reached = 0
        self.stream: LateStream | None = None

    def record(self, stream: LateStream) -> None:
        self.round += 1
        self.stream = stream
        stream.work.append(self._reach)

    def _reach(self) -> None:
        self.reached += 1

    def wait_for(self, round: int) -> None:
        assert self.stream is not None, "waits for an event that was never recorded"
        self.stream.run_until(lambda: self.reached >= round)

    def synchronize(self) -> None:
        self.wait_for(self.round)


class LateTensor:
    """A tensor on the device: copies into and out of it are put on the current stream."""

    def __init__(self, runtime: LateRuntime, values: torch.Tensor) -> None:
        self.runtime, self.values = runtime, values

    def __getitem__(self, rows: slice) -> LateTensor:
        return LateTensor(self.runtime, self.values[rows])

    def copy_(self, source: torch.Tensor | LateTensor, non_blocking: bool = False) -> None:
        assert non_blocking
        self.runtime.later(lambda: self.values.copy_(source.values if isinstance(source, LateTensor) else source))


class LateRuntime:
    """CUDA as far as the mapper sees it; nothing is computed before it must be."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.current: LateStream | None = None

    def later(self, work: Callable[[], object]) -> None:
        assert self.current is not None, "works on no stream of its own"
        self.current.work.append(lambda: (work(), None)[1])

    def stream(self) -> LateStream:
        return LateStream()

    def event(self) -> LateEvent:
        return LateEvent()

    @contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> LateTensor:
        return LateTensor(self, torch.zeros(shape, dtype=dtype))

    def copy(self, pinned: torch.Tensor, result: LateTensor) -> None:
        self.later(lambda: pinned.copy_(result.values))

    def used_on(self, tensor: LateTensor, stream: LateStream) -> None:
        assert stream is self.current

    def free_bytes(self) -> int:
        return 1 << 40


class LateMap(TensorMap):
    """Puts the map on the current stream."""

    def __init__(self, runtime: LateRuntime, aligner: Any, source_dtype: str, stored_dtype: str) -> None:
        super().__init__(aligner, source_dtype, stored_dtype)
        self.runtime = runtime

    def apply(self, stored: Any) -> Any:
        count, width = stored.values.shape
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        results = (
            torch.zeros((count, width), dtype=self._stored),
            torch.zeros(count, dtype=integers[self._source.itemsize]),
            torch.zeros(count, dtype=integers[self._stored.itemsize]),
        )

        def compute() -> None:
            for result, value in zip(results, super(LateMap, self).apply(stored.values), strict=True):
                result.copy_(value)

        self.runtime.later(compute)
        return tuple(LateTensor(self.runtime, result) for result in results)


class Double:
    """z = 2 y."""

    width = WIDTH

    def calibrated(self, source: Any, *, calibration: str | None = None) -> Double:
        return self

    def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2


def late_mapper(source_dtype: str, stored_dtype: str) -> CudaMapper:
    runtime = LateRuntime()
    extent = Extent(WIDTH, source_dtype, stored_dtype, 64)
    return CudaMapper(LateMap(runtime, Double(), source_dtype, stored_dtype), extent, runtime)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("stored_dtype", ["float16", "float32"])
def test_results_are_complete_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, stored_dtype: str
) -> None:
    monkeypatch.setattr(device_module, "CUDA_BATCH_BYTES", 1)
    monkeypatch.setattr(device_module, "DEVICE_ROWS", 64)
    rows = np.random.default_rng(0).standard_normal((1001, WIDTH)).astype(np.float16)
    with EmbeddingWriter(tmp_path / f"in{suffix}") as writer:
        writer.write(rows)
    shard = open_embeddings(tmp_path / f"in{suffix}").shards[0]
    mapper = late_mapper("float16", stored_dtype)
    reader = Crew(1, "aniso-read")
    assert mapper.batch_rows == 64
    for _ in range(2):  # the second shard meets used buffers
        parts = []
        with mapper:
            for batch in mapped_batches(shard, mapper, reader):
                mapped = batch.result()
                assert np.array_equal(mapped.source_magnitudes, magnitudes(batch.rows).astype(np.int16))
                assert np.array_equal(mapped.magnitudes, magnitudes(mapped.rows))
                parts.append(mapped.rows.copy())
        assert [len(part) for part in parts] == [64] * 15 + [41]
        assert np.array_equal(np.concatenate(parts), (2 * rows).astype(stored_dtype))
    assert len(mapper._slots) <= mapper.depth + 1


def test_a_shard_after_a_failure_finds_its_buffers_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "CUDA_BATCH_BYTES", 1)
    monkeypatch.setattr(device_module, "DEVICE_ROWS", 64)
    rows = np.random.default_rng(1).standard_normal((500, WIDTH)).astype(np.float32)
    np.save(tmp_path / "in.npy", rows)
    shard = open_embeddings(tmp_path / "in.npy").shards[0]
    mapper = late_mapper("float32", "float32")
    reader = Crew(1, "aniso-read")

    def run(mapper: Mapper, stop: int | None) -> list[np.ndarray]:
        parts = []
        with mapper:
            batches = mapped_batches(shard, mapper, reader)
            for number, batch in enumerate(batches):
                parts.append(batch.result().rows.copy())
                if number == stop:
                    batches.close()
                    raise KeyboardInterrupt
        return parts

    for stop in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(mapper, stop)
    assert np.array_equal(np.concatenate(run(mapper, None)), 2 * rows)
    assert len(mapper._slots) <= mapper.depth + 1


def test_batches_for_a_device_are_large_and_fit_it() -> None:
    mapper = late_mapper("float16", "float16")
    assert mapper._most_rows == device_module.CUDA_BATCH_BYTES // (2 * WIDTH)
    assert mapper.for_rows(100_000).batch_rows < 100_000 / mapper.depth
    runtime = LateRuntime()
    runtime.free_bytes = lambda: 1_000_000  # type: ignore[method-assign]
    small = CudaMapper(
        LateMap(runtime, Double(), "float16", "float16"), Extent(WIDTH, "float16", "float16", 64), runtime
    )  # type: ignore[arg-type]
    assert 32 <= small.batch_rows < 1_000_000 / 4 / (2 * WIDTH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("width", "rank"), [(70, 22), (512, 128), (1280, 128), (1280, 200)])
def test_a_kernel_maps_rows_apart(width: int, rank: int, dtype: str, backend: str) -> None:
    if (backend, dtype) == ("triton", "float64"):
        pytest.skip("Triton's kernels have no float64")
    values = np.random.default_rng(3).standard_normal((4096, width)) + 0.3
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    aligner = AnisoAlign(rank=rank, refine=False).fit(values, -values[::-1]).set_params(backend=backend)
    rows = torch.from_numpy(values).to("cuda", getattr(torch, dtype))
    whole = aligner.transform_batch(rows)
    assert aligner.maps_rows_apart(rows)
    for first, last in ((0, 1), (1, 4096), (5, 700), (131, 132), (127, 2176)):
        part = aligner.transform_batch(rows[first:last])
        assert torch.equal(part, whole[first:last]), (first, last)


@pytest.mark.parametrize("apart", [False, True])
def test_a_batch_on_a_device_is_mapped_whole_only_if_its_rows_are_apart(apart: bool) -> None:
    sizes = []

    class Counting(Double):
        def maps_rows_apart(self, batch: torch.Tensor) -> bool:
            return apart

        def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
            sizes.append(len(rows))
            return super().transform_batch(rows)

    rows = torch.arange(5000.0 * WIDTH).reshape(5000, WIDTH)
    mapped, _, _ = TensorMap(Counting(), "float32", "float32").apply(rows)
    assert torch.equal(mapped, 2 * rows)
    assert sizes == ([5000] if apart else [4096, 4096])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("refine", [False, True])
def test_files_through_a_device_are_what_transform_gives(tmp_path: Path, dtype: str, refine: bool) -> None:
    width, count = 64, 40_000
    values = np.random.default_rng(2).standard_normal((count, width)) + 0.3
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    options: dict[str, Any] = {}
    if refine:
        options = {"prior_training": TrainingOptions(steps=5), "refinement_training": TrainingOptions(steps=5)}
    aligner = AnisoAlign(rank=32, refine=refine, **options).fit(values[:5000], -values[5000:10_000])
    with EmbeddingWriter(tmp_path / "in.safetensors", dtype=dtype) as writer:
        writer.write(values)
    shard = open_embeddings(tmp_path / "in.safetensors").shards[0]
    contents = []
    for memory in (None, 20_000_000, 60_000_000):
        target = Target(shard, tmp_path / "out.safetensors", "safetensors")
        with ShardConverter(aligner, dtype, 8192, "fail", device="cuda", memory=memory) as converter:
            line = converter.convert(target, lambda rows: None)
        contents.append((target.path.read_bytes(), line))
    assert contents[1:] == contents[:1] * 2
    rows = torch.from_numpy(open_embeddings(tmp_path / "in.safetensors").numpy()).to("cuda", getattr(torch, dtype))
    want = aligner.transform(rows).to(torch.float64).cpu().numpy()
    got = open_embeddings(tmp_path / "out.safetensors").numpy()
    # the library that multiplies for the refiner may choose another order of sums for batches of another size
    allowed = 4 * torch.finfo(getattr(torch, dtype)).eps if refine else 0
    assert np.abs(got - want).max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bad_rows_on_a_device(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).standard_normal((5000, WIDTH)).astype(np.float32)
    rows[[7, 4999]] = 0
    rows[2000, 3] = np.inf
    np.save(tmp_path / "in.npy", rows)
    target = Target(open_embeddings(tmp_path / "in.npy").shards[0], tmp_path / "out.npy", "npy")
    with ShardConverter(Double(), "float32", 8192, "drop", device="cuda") as converter:  # type: ignore[arg-type]
        line = converter.convert(target, lambda count: None)
    assert line["bad_rows"] == [7, 2000, 4999]
    assert np.array_equal(np.load(tmp_path / "out.npy"), 2 * np.delete(rows, [7, 2000, 4999], axis=0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_a_device_converted_is_verified_there(tmp_path: Path, dtype: str, calibration: str) -> None:
    """A refined aligner, whose products may change with the size of a batch: the same bytes again, all or sampled."""
    width, count = 128, 150_001
    values = np.random.default_rng(4).standard_normal((count, width)) + 0.3
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    short = TrainingOptions(steps=5)
    aligner = AnisoAlign(rank=32, prior_training=short, refinement_training=short)
    aligner.fit(values[:5000], -values[5000:10_000])
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.split(values.astype(dtype), [70_003, 70_004])):
        np.save(tmp_path / "in" / f"{number}.npy", part)
    options: dict[str, Any] = {"calibration": calibration, "device": "cuda"}
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", **options)
    for rows, memory in (("all", None), ("all", 1 << 29), ("sample", None)):
        report = verify_conversion(aligner, tmp_path / "in", tmp_path / "out", rows=rows, memory=memory, **options)
        assert report.rows == count
    path = tmp_path / "out" / "2.npy"
    bytes_of = bytearray(path.read_bytes())
    bytes_of[-5 * width * np.dtype(dtype).itemsize] ^= 1
    path.write_bytes(bytes_of)
    with pytest.raises(DataError, match=r"2\.npy"):
        verify_conversion(aligner, tmp_path / "in", tmp_path / "out", **options)
