"""EmbeddingWriter: readable by others, independent of batch cuts, atomic, nothing left behind."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from aniso_ext.data import EmbeddingWriter, open_embeddings
from aniso_ext.data import locations as locations_module
from aniso_ext.data import sinks as sinks_module
from aniso_ext.data.dtypes import round_to_bfloat16
from aniso_ext.errors import DataError, InputError

ROWS = np.random.default_rng(0).standard_normal((23, 4)).astype(np.float32)
SUFFIXES = [".npy", ".parquet", ".safetensors"]


def write(path: Path, parts: list[np.ndarray], **options: object) -> Path:
    with EmbeddingWriter(path, **options) as writer:  # type: ignore[arg-type]
        for part in parts:
            writer.write(part)
    return path


def read_independently(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            return file.get_tensor("embeddings").float().numpy()
    return np.stack(pq.read_table(path).column("embedding").to_numpy())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_readers_see_the_rows(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = write(tmp_path / "new" / f"x{suffix}", [ROWS[:10], ROWS[10:10], ROWS[10:]], dtype=dtype)
    assert np.array_equal(read_independently(path), ROWS.astype(dtype))
    opened = open_embeddings(path)
    assert opened.stored_dtype == dtype
    assert np.array_equal(opened.numpy(), ROWS.astype(dtype))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_npy_bytes_are_those_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "want.npy", ROWS)
    path = write(tmp_path / "got.npy", [ROWS[:3], ROWS[3:]])
    assert path.read_bytes() == (tmp_path / "want.npy").read_bytes()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=5), suffix=st.sampled_from(SUFFIXES))
def test_bytes_do_not_depend_on_the_batches(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks_module, "_GROUP_BYTES", 5 * 16)  # row groups of 5
        whole = write(folder / f"a{suffix}", [ROWS])
        parts = write(folder / f"b{suffix}", np.split(ROWS, sorted(cuts)))
    assert whole.read_bytes() == parts.read_bytes()
    assert np.array_equal(read_independently(parts), ROWS)


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((1000, 8)).astype(np.float32)
    values[0] = [np.nan, np.inf, -np.inf, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e-40, np.float32(3.38e38)]
    want = torch.from_numpy(values).bfloat16()
    assert np.array_equal(round_to_bfloat16(values[1:]), want[1:].view(torch.uint16).numpy())
    path = write(tmp_path / "x.safetensors", [values], dtype=torch.bfloat16)
    assert np.array_equal(read_independently(path), want.float().numpy(), equal_nan=True)
    negative_nan = np.array([[-np.nan]], np.float32)
    assert np.isnan((round_to_bfloat16(negative_nan).astype(np.uint32) << 16).view(np.float32)).all()
    for suffix in (".npy", ".parquet"):
        with pytest.raises(InputError, match="cannot hold bfloat16"):
            EmbeddingWriter(tmp_path / f"y{suffix}", dtype="bfloat16")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, suffix: str, error: BaseException) -> None:
    with pytest.raises(type(error)), EmbeddingWriter(tmp_path / "deep" / "er" / f"x{suffix}") as writer:
        writer.write(ROWS)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locations_module, "sync", full)
    with pytest.raises(DataError, match=rf"x{suffix}: cannot be written \(No space left on device\)"):
        write(tmp_path / "new" / f"x{suffix}", [ROWS])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_a_disk_that_is_full_for_the_last_bytes_too_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    class Full:
        def discard(self) -> None:  # what closing a file of a network may say
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyboardInterrupt), EmbeddingWriter(tmp_path / f"rows.{suffix}") as writer:
        writer.write(np.ones((3, 2), np.float32))
        assert writer._sink is not None
        writer._sink._file = Full()  # type: ignore[attr-defined]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", [ROWS])
    with pytest.raises(DataError, match=r"x\.npy: exists already"):
        EmbeddingWriter(path)
    with pytest.raises(RuntimeError), EmbeddingWriter(path, overwrite=True) as writer:
        writer.write(ROWS[:1])
        raise RuntimeError("stop")
    assert np.array_equal(np.load(path), ROWS)
    write(path, [ROWS[:2]], overwrite=True)
    assert np.array_equal(np.load(path), ROWS[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.npy"]


def test_a_file_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"), EmbeddingWriter(tmp_path / "x.npy") as writer:
        writer.write(ROWS)
        np.save(tmp_path / "x.npy", ROWS[:1])
    assert np.array_equal(np.load(tmp_path / "x.npy"), ROWS[:1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.npy"]


def test_values_that_overflow_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    wide = ROWS.astype(np.float64)
    wide[17, 2] = 1e6
    with pytest.raises(DataError, match="row 17 overflows float16"):
        write(tmp_path / "x.npy", [wide[:10], wide[10:]], dtype="float16")
    wide[17, 2] = 1e300
    with pytest.raises(DataError, match="row 17 overflows bfloat16"):
        write(tmp_path / "x.safetensors", [wide], dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []
    wide[17, 2] = np.inf  # not an overflow: stored as it is
    assert np.isinf(np.load(write(tmp_path / "x.npy", [wide], dtype="float16"))[17, 2])


def test_wrong_batches_and_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would have no rows"):
        write(tmp_path / "x.npy", [ROWS[:0]])
    with pytest.raises(InputError, match=r"needs floating \[n, 4\] rows, got float32 \[23, 3\]"):
        write(tmp_path / "x.npy", [ROWS, ROWS[:, :3]])
    with pytest.raises(InputError, match=r"\[n, 5\] rows"):
        write(tmp_path / "x.npy", [ROWS], width=5)
    with pytest.raises(InputError, match="int64"):
        write(tmp_path / "x.npy", [ROWS.astype(int)])
    with pytest.raises(InputError, match="cannot tell the format"):
        EmbeddingWriter(tmp_path / "x.bin")
    with pytest.raises(InputError, match="stored as float16"):
        EmbeddingWriter(tmp_path / "x.npy", dtype="int8")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        EmbeddingWriter(tmp_path / "x.npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "y.npy", [ROWS])


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = write(tmp_path / "x.npy", [ROWS])
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix, dtype", [(".npy", "float16"), (".parquet", "float32"), (".safetensors", "bfloat16")])
def test_stored_batches_copy_a_file_through_one_buffer(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = write(tmp_path / f"x{suffix}", [ROWS], dtype=dtype)
    shard = open_embeddings(path).shards[0]
    buffer = np.empty((5, 4), np.uint16 if dtype == "bfloat16" else dtype)
    copy = tmp_path / f"copy{suffix}"
    with EmbeddingWriter(copy, dtype=dtype, width=4) as writer:
        for batch in shard.stored_batches(0, 23, 5, lambda: buffer):
            assert suffix == ".parquet" or np.shares_memory(batch, buffer)
            writer.write_stored(batch)
            writer.sync()
            batch[:] = 0
    assert copy.read_bytes() == path.read_bytes()


def test_stored_rows_must_be_as_they_are_stored(tmp_path: Path) -> None:
    with EmbeddingWriter(tmp_path / "x.safetensors", dtype="bfloat16", width=4) as writer:
        with pytest.raises(InputError, match=r"needs \[n, 4\] rows of uint16, got float32 \[23, 4\]"):
            writer.write_stored(ROWS)
        writer.write(ROWS)
