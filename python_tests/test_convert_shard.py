"""One shard: the same bytes however it is cut, everything at the same time, and nothing left of a failure."""

from __future__ import annotations

import errno
import pickle
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext.align import AnisoAlign, TrainingOptions, list_aligners, make_aligner
from aniso_ext.bench.conversions import measure_conversion
from aniso_ext.convert import overlap
from aniso_ext.convert.device import Extent, HostMapper
from aniso_ext.convert.digest import RowDigest, shard_digest
from aniso_ext.convert.maps import TensorMap
from aniso_ext.convert.plan import Target
from aniso_ext.convert.rows import bad_indices, magnitudes
from aniso_ext.convert.shard import ShardConverter
from aniso_ext.data import EmbeddingWriter, open_embeddings
from aniso_ext.data import sinks as sinks_module
from aniso_ext.data.dtypes import round_to_bfloat16, widen_bfloat16
from aniso_ext.errors import DataError, InputError

WIDTH = 16
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def unit(rows: int, seed: int = 0, shift: float = 0.3) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH)) + shift
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def aligner() -> AnisoAlign:
    return AnisoAlign(rank=8, refine=False, knots=32).fit(unit(400), unit(400, 1, -0.3))


@pytest.fixture(scope="module")
def refined() -> AnisoAlign:
    schedule = TrainingOptions(steps=10, batch_rows=64)
    model = AnisoAlign(rank=8, knots=32, prior_training=schedule, refinement_training=schedule)
    return model.fit(unit(400), unit(400, 1, -0.3))


def target_of(source: Path, output: Path) -> Target:
    return Target(open_embeddings(source).shards[0], output, output.suffix.removeprefix("."))


def store(path: Path, rows: np.ndarray, dtype: str) -> Path:
    with EmbeddingWriter(path, dtype=dtype) as writer:
        writer.write(rows)
    return path


def convert(aligner: Any, source: Path, output: Path, dtype: str, **options: Any) -> dict[str, Any]:
    options = {"batch_rows": 64, "on_bad": "fail", **options}
    with ShardConverter(aligner, dtype, **options) as converter:
        return converter.convert(target_of(source, output), lambda rows: None)


def left_behind(folder: Path) -> list[str]:
    """Files other than the input, and threads of the pipeline."""
    files = [entry.name for entry in folder.iterdir() if not entry.name.startswith("in.")]
    return files + [thread.name for thread in threading.enumerate() if thread.name.startswith("aniso-")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_do_not_depend_on_batches_threads_or_memory(tmp_path: Path, aligner: AnisoAlign, dtype: str) -> None:
    source = store(tmp_path / "in.safetensors", unit(3001, 2), dtype)
    lines, files = [], []
    for options in (
        {"batch_rows": 8192, "threads": 1},
        {"batch_rows": 8192, "threads": 3},
        {"batch_rows": 1, "threads": 2},
        {"batch_rows": 1000, "threads": 2},
        {"batch_rows": 8192, "threads": 2, "memory": 200_000},
    ):
        lines.append(convert(aligner, source, tmp_path / "out.safetensors", dtype, **options))
        files.append((tmp_path / "out.safetensors").read_bytes())
    assert files == files[:1] * len(files)
    assert lines == lines[:1] * len(lines)
    # products of other than whole 32 rows may round differently
    rows = torch.from_numpy(open_embeddings(source).numpy()[: 93 * 32]).to(getattr(torch, dtype))
    want = aligner.transform(rows)
    got = open_embeddings(tmp_path / "out.safetensors").numpy()
    assert np.array_equal(got[: 93 * 32], want.to(torch.float32 if dtype == "bfloat16" else want.dtype).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_refined_rows_do_not_depend_on_batches(tmp_path: Path, refined: AnisoAlign, dtype: str) -> None:
    source = store(tmp_path / "in.safetensors", unit(5003, 2), dtype)
    files = []
    for batch_rows, threads in ((8192, 1), (8192, 2), (32, 2), (1000, 3)):
        convert(refined, source, tmp_path / "out.safetensors", dtype, batch_rows=batch_rows, threads=threads)
        files.append((tmp_path / "out.safetensors").read_bytes())
    assert files == files[:1] * len(files)


@pytest.mark.parametrize("method", [name for name in list_aligners() if name != "anisoalign"])
def test_every_method_maps_row_by_row(tmp_path: Path, method: str) -> None:
    model = make_aligner(method).fit(unit(300), unit(300, 1, -0.3))
    rows = unit(500, 2).astype(np.float32)
    rows[100, 3], rows[200, 0], rows[300] = np.inf, np.nan, 0
    source = store(tmp_path / "in.npy", rows, "float32")
    for number, batch_rows in enumerate((32, 224, 512)):
        options = {"batch_rows": batch_rows, "threads": 2, "on_bad": "drop"}
        line = convert(model, source, tmp_path / f"{number}.npy", "float32", **options)
        assert line["bad_rows"] == [100, 200, 300]
    first, second, third = (np.load(tmp_path / f"{number}.npy") for number in range(3))
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)
    good = np.delete(rows, [100, 200, 300], axis=0)
    assert np.abs(first - model.transform(good, calibration="fitted")).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_magnitudes_find_zero_and_non_finite_rows_of_any_bits(data: st.DataObject, dtype: str) -> None:
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    special = {2: [0, 0x8000, 0x7C00, 0xFC00, 0x7F80, 0x7BFF, 1, 0x7E00], 4: [0, 0x80000000, 0x7F800000, 1], 8: [0, 1]}
    bits = st.one_of(st.sampled_from(special[size]), st.integers(0, 2 ** (8 * size) - 1))
    drawn = data.draw(st.lists(bits, min_size=rows * width, max_size=rows * width))
    stored = np.array(drawn, f"u{size}").reshape(rows, width)
    values = widen_bfloat16(stored) if dtype == "bfloat16" else stored.view(dtype)
    want = np.flatnonzero(~np.isfinite(values).all(axis=1) | (values == 0).all(axis=1))
    assert np.array_equal(bad_indices(magnitudes(stored if dtype == "bfloat16" else values), dtype), want)


def test_magnitudes_over_many_tiles() -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 300))
    assert np.array_equal(magnitudes(rows).view(np.float64), np.abs(rows).max(axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_bad", ["fail", "drop", "zero"])
def test_bad_rows_among_good_ones(tmp_path: Path, aligner: AnisoAlign, dtype: str, on_bad: str) -> None:
    rows = unit(200, 3)
    rows[[5, 70, 199]] = 0
    rows[71, 15], rows[130, 0], rows[131, 7] = np.nan, np.inf, -np.inf
    bad = [5, 70, 71, 130, 131, 199]
    stored = store(tmp_path / "in.safetensors", rows, dtype)
    output = tmp_path / "out.safetensors"
    if on_bad == "fail":
        with pytest.raises(DataError, match=r"in\.safetensors: row 5 is zero, which cannot be converted"):
            convert(aligner, stored, output, dtype)
        assert left_behind(tmp_path) == []
        return
    line = convert(aligner, stored, output, dtype, on_bad=on_bad)
    store(tmp_path / "good.safetensors", np.delete(rows, bad, axis=0), dtype)
    convert(aligner, tmp_path / "good.safetensors", tmp_path / "want.safetensors", dtype)
    want, got = (open_embeddings(path).numpy() for path in (tmp_path / "want.safetensors", output))
    assert line["bad_rows"] == bad
    assert line["rows"] == (200 if on_bad == "zero" else 194)
    assert line["norms"] is not None
    if on_bad == "zero":
        assert not got[bad].any()
        got = np.delete(got, bad, axis=0)
    assert np.array_equal(got, want)


def test_norms_are_those_of_every_64th_row(tmp_path: Path, aligner: AnisoAlign) -> None:
    rows = unit(200, 4) * np.where(np.arange(200) % 64 == 0, np.arange(200) / 64 + 1, 1000)[:, None]
    source = store(tmp_path / "in.npy", rows, "float32")
    for batch_rows in (32, 96, 512):
        line = convert(aligner, source, tmp_path / "out.npy", "float32", batch_rows=batch_rows)
        assert line["norms"] == [1.0, 4.0]


class Large:
    """Stand-ins of 1e6 times the row, as an aligner of tensors."""

    width = WIDTH

    def __init__(self, scale: float = 1e6) -> None:
        self.scale = scale

    def calibrated(self, source: Any, *, calibration: str | None = None) -> Large:
        return self

    def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.scale


def test_a_stand_in_that_does_not_fit_is_named(tmp_path: Path) -> None:
    rows = np.full((100, WIDTH), 1e-6)
    rows[3] = 0
    rows[90, 5] = 10.0
    source = store(tmp_path / "in.npy", rows, "float32")
    for on_bad, row in (("zero", 90), ("drop", 89)):
        with pytest.raises(DataError, match=rf"out\.npy: row {row} overflows float16: store a wider dtype"):
            convert(Large(), source, tmp_path / "out.npy", "float16", on_bad=on_bad)
    with pytest.raises(DataError, match=r"in\.npy: row 90 is finite, but its stand-in is not"):
        convert(Large(1e38), source, tmp_path / "out.npy", "float32", on_bad="drop")
    assert left_behind(tmp_path) == []


class Failing(Large):
    """Fails at the third batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(1.0)
        self.error, self.calls, self.lock = error, 0, threading.Lock()

    def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.calls += 1
            if self.calls == 3:
                raise self.error
        return rows.clone()


@pytest.mark.parametrize("error", [ValueError("no such phase"), KeyboardInterrupt()])
def test_a_failing_map_is_the_error_of_the_caller(tmp_path: Path, error: BaseException) -> None:
    source = store(tmp_path / "in.npy", unit(20_000), "float32")
    with pytest.raises(type(error)) as caught:
        convert(Failing(error), source, tmp_path / "out.npy", "float32", batch_rows=1024, threads=2)
    assert caught.value is error
    assert left_behind(tmp_path) == []


def test_a_file_that_shrinks_is_an_error_of_the_reader(tmp_path: Path) -> None:
    source = store(tmp_path / "in.npy", unit(20_000), "float32")
    target = target_of(source, tmp_path / "out.npy")
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 100)
    with (
        pytest.raises(DataError, match=r"in\.npy: became shorter while it was being read"),
        ShardConverter(Large(1.0), "float32", 1024, "fail") as converter,
    ):
        converter.convert(target, lambda rows: None)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("stage", ["write", "sync", "hash", "advance"])
def test_errors_while_writing_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    source = store(tmp_path / "in.npy", unit(20_000), "float32")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments: Any) -> None:
        raise full if stage != "advance" else KeyboardInterrupt

    monkeypatch.setattr(overlap, "SYNC_BYTES", 1)
    wanted: type[BaseException] = DataError
    if stage == "write":
        monkeypatch.setattr(sinks_module._NpySink, "write", fail)
    elif stage == "sync":
        monkeypatch.setattr("aniso_ext.data.writer.sync", fail)
    elif stage == "hash":
        monkeypatch.setattr(RowDigest, "update", fail)
        wanted = OSError
    else:
        wanted = KeyboardInterrupt
    converter = ShardConverter(Large(1.0), "float32", 1024, "fail")
    with pytest.raises(wanted, match="No space left" if stage != "advance" else None):
        converter.convert(target_of(source, tmp_path / "out.npy"), fail if stage == "advance" else lambda rows: None)
    assert left_behind(tmp_path) == []
    monkeypatch.undo()
    # the same converter, whose buffers may have been in use, goes on with the next shard
    with converter:
        line = converter.convert(target_of(source, tmp_path / "out.npy"), lambda rows: None)
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.load(source))
    assert line["xxh3_128"] == shard_digest(open_embeddings(source).shards[0])


def test_reading_goes_on_while_a_batch_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store(tmp_path / "in.npy", unit(20_000), "float32")
    reads, third_read = [0], threading.Event()
    original = HostMapper.buffer

    def counted(self: HostMapper) -> np.ndarray:
        reads[0] += 1
        if reads[0] == 3:
            third_read.set()
        return original(self)

    class Waiting(Large):
        """Its first batch waits for the third to be read."""

        def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
            assert third_read.wait(60), "nothing was read while the first batch was mapped"
            return rows * self.scale

    monkeypatch.setattr(HostMapper, "buffer", counted)
    convert(Waiting(1.0), source, tmp_path / "out.npy", "float32", batch_rows=1024, threads=1)
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.load(source))


def test_an_aligner_that_hands_its_rows_back_is_safe(tmp_path: Path) -> None:
    class Identity(Large):
        def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    source = store(tmp_path / "in.npy", unit(30_000), "float32")
    for suffix in (".npy", ".parquet", ".safetensors"):
        convert(Identity(), source, tmp_path / f"out{suffix}", "float32", batch_rows=1024, threads=3)
        assert np.array_equal(open_embeddings(tmp_path / f"out{suffix}").numpy(), np.load(source))


def test_memory_is_bounded_whatever_the_length(tmp_path: Path) -> None:
    peaks = []
    for rows in (40_000, 160_000):
        source = store(tmp_path / f"in.{rows}.npy", np.tile(unit(1000), (rows // 1000, 1)), "float32")
        target = target_of(source, tmp_path / "out.npy")
        with ShardConverter(Large(1.0), "float32", 8192, "fail", memory=2_000_000, threads=2) as converter:
            tracemalloc.start()
            converter.convert(target, lambda rows: None)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        ((_, mapper),) = converter._prepared.values()
        assert isinstance(mapper, HostMapper)
        assert len(mapper._sources) <= mapper.depth + 1
        assert len(mapper._results) <= mapper.depth
    assert peaks[1] < 1.05 * peaks[0] < 2_000_000
    with pytest.raises(InputError, match=r"memory of 1000 bytes is too little: width 16 needs \d+"):
        convert(Large(1.0), source, tmp_path / "out.npy", "float32", memory=1000)


def test_memory_divides_among_everything_in_flight() -> None:
    extent = Extent(512, "float16", "float16", 1 << 20, memory=100_000_000)
    rows = extent.limited(1 << 20, depth=4, workers=2)
    # five buffers in, four stand-ins out of 2 bytes, and three batches of 4 bytes in each of two workers
    assert rows % 32 == 0
    assert rows * 512 * (5 * 2 + 4 * 2 + 2 * 3 * 4) <= 100_000_000 < (rows + 32) * 512 * (5 * 2 + 4 * 2 + 2 * 3 * 4)


def test_a_short_shard_is_shared_by_the_threads() -> None:
    mapper = HostMapper(TensorMap(Large(), "float32", "float32"), Extent(WIDTH, "float32", "float32", 8192), 2)
    assert [mapper.for_rows(rows).batch_rows for rows in (1, 8192, 1_000_000)] == [1024, 2048, 8192]


def test_the_hash_is_that_of_the_numbers(tmp_path: Path, aligner: AnisoAlign) -> None:
    import xxhash

    source = store(tmp_path / "in.npy", unit(1000, 5), "float32")
    lines = [convert(aligner, source, tmp_path / f"out{suffix}", "float32") for suffix in (".npy", ".parquet")]
    content = np.load(tmp_path / "out.npy")
    want = xxhash.xxh3_128(content.tobytes()).hexdigest()
    assert [line["xxh3_128"] for line in lines] == [want, want]
    assert [shard_digest(open_embeddings(tmp_path / f"out{suffix}").shards[0]) for suffix in (".npy", ".parquet")] == [
        want,
        want,
    ]
    half = store(tmp_path / "half.safetensors", content, "bfloat16")
    assert shard_digest(open_embeddings(half).shards[0]) == xxhash.xxh3_128(round_to_bfloat16(content)).hexdigest()


def test_a_converter_can_be_sent_to_another_process(tmp_path: Path, aligner: AnisoAlign) -> None:
    source = store(tmp_path / "in.npy", unit(100, 6), "float32")
    lines = []
    with ShardConverter(aligner, "float32", 64, "fail") as converter:
        lines.append(converter.convert(target_of(source, tmp_path / "a.npy"), lambda rows: None))
        with pickle.loads(pickle.dumps(converter)) as other:
            lines.append(other.convert(target_of(source, tmp_path / "a.npy"), lambda rows: None))
    assert lines[0] == lines[1]


def test_a_device_that_is_not_there(tmp_path: Path, aligner: AnisoAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = store(tmp_path / "in.npy", unit(100, 6), "float32")
    with pytest.raises(InputError, match="device 'cuda:1' is not there"):
        convert(aligner, source, tmp_path / "out.npy", "float32", device="cuda:1")
    assert left_behind(tmp_path) == []


def test_a_conversion_is_measured_in_its_own_process(tmp_path: Path, aligner: AnisoAlign) -> None:
    aligner.save_pretrained(tmp_path / "aligner")
    source = store(tmp_path / "in.npy", unit(1000, 7), "float32")
    found = measure_conversion(tmp_path / "aligner", source, tmp_path / "out", batch_rows=256)
    assert (found.rows, found.bytes) == (1000, (tmp_path / "out" / "in.npy").stat().st_size)
    assert found.peak_bytes > 1 << 25  # more than an interpreter alone
    assert found.seconds > 0
    assert found.rows_per_s == 1000 / found.seconds
    with pytest.raises(DataError, match=r"nothing\.npy: does not exist"):
        measure_conversion(tmp_path / "aligner", tmp_path / "nothing.npy", tmp_path / "out")
