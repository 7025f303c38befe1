"""open_embeddings: every format and layout gives the rows that were stored, in bounded batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aniso_ext.data import EmbeddingSet, EmbeddingWriter, open_embeddings, read_metadata, write_clip_retrieval
from aniso_ext.data import shards as shards_module
from aniso_ext.errors import DataError, InputError


def matrix(rows: int, width: int = 5, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(dtype)


def store(path: Path, rows: np.ndarray, *, row_group: int = 1000) -> Path:
    """Independent writers, so that reading is not tested against our own writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".safetensors":
        save_file({"embeddings": torch.from_numpy(rows)}, str(path))
    else:
        values = pa.array(np.ascontiguousarray(rows).reshape(-1))
        table = pa.table(
            {"id": range(len(rows)), "embedding": pa.FixedSizeListArray.from_arrays(values, rows.shape[1])}
        )
        pq.write_table(table, path, row_group_size=row_group)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_each_format_gives_back_its_rows(tmp_path: Path, suffix: str, dtype: str) -> None:
    rows = matrix(57, dtype=dtype)
    opened = open_embeddings(store(tmp_path / f"x{suffix}", rows, row_group=10))
    assert (opened.rows, opened.width, opened.dtype, opened.stored_dtype) == (57, 5, np.dtype(dtype), dtype)
    assert len(opened) == 57
    batches = list(opened.iter_batches(8))
    assert max(len(batch) for batch in batches) <= 8
    assert all(batch.flags.c_contiguous and batch.flags.writeable and batch.dtype == dtype for batch in batches)
    assert np.array_equal(np.concatenate(batches), rows)
    assert np.array_equal(opened.numpy(), rows)
    assert opened.shards[0].format == suffix[1:]


def test_fortran_order_is_read_in_row_order(tmp_path: Path) -> None:
    rows = matrix(41, 7)
    np.save(tmp_path / "x.npy", np.asfortranarray(rows))
    opened = open_embeddings(tmp_path / "x.npy")
    assert np.array_equal(np.concatenate(list(opened.iter_batches(9))), rows)
    assert np.array_equal(opened.read([40, 0, 3]), rows[[40, 0, 3]])


def test_npy_format_version_2(tmp_path: Path) -> None:
    rows = matrix(6)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, rows, version=(2, 0))
    assert np.array_equal(open_embeddings(tmp_path / "x.npy").numpy(), rows)


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    rows = torch.from_numpy(matrix(9)).bfloat16()
    save_file({"anything": rows}, str(tmp_path / "x.safetensors"))
    opened = open_embeddings(tmp_path / "x.safetensors")
    assert (opened.dtype, opened.stored_dtype) == (np.float32, "bfloat16")
    assert np.array_equal(opened.numpy(), rows.float().numpy())
    assert np.array_equal(opened.read([8, 2]), rows.float().numpy()[[8, 2]])
    assert open_embeddings(rows).stored_dtype == "bfloat16"
    assert np.array_equal(open_embeddings(rows).numpy(), rows.float().numpy())


def test_shards_follow_each_other_in_natural_order(tmp_path: Path) -> None:
    parts = {number: matrix(number % 4 + 1, seed=number) for number in (0, 1, 2, 9, 10, 11, 100)}
    for number, rows in parts.items():
        store(tmp_path / f"emb_{number}.npy", rows)
    (tmp_path / "notes.txt").write_text("not a shard")
    (tmp_path / ".emb_0.npy.0123.tmp").write_text("left over")
    opened = open_embeddings(tmp_path)
    assert [shard.name for shard in opened.shards] == [f"emb_{number}.npy" for number in parts]
    assert np.array_equal(opened.numpy(), np.concatenate(list(parts.values())))
    sizes = [len(batch) for batch in opened.iter_batches(3)]
    assert sizes == [1, 2, 3, 2, 3, 3, 1, 1]  # never across two shards


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_read_is_numpy_indexing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("set")
    suffix = data.draw(st.sampled_from([".npy", ".parquet", ".safetensors"]))
    parts = [matrix(size, 3, seed=i) for i, size in enumerate(sizes)]
    for i, part in enumerate(parts):
        store(folder / f"{i}{suffix}", part, row_group=4)
    whole, opened = np.concatenate(parts), open_embeddings(folder)
    rows = data.draw(
        st.one_of(
            st.slices(len(whole)),
            st.lists(st.integers(-len(whole), len(whole) - 1), max_size=12),
            st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)).map(np.array),
        )
    )
    want = whole[rows] if not isinstance(rows, list) else whole[np.array(rows, dtype=int)]
    assert np.array_equal(opened.read(rows), want)


def test_read_refuses_what_is_not_there() -> None:
    opened = open_embeddings(matrix(4))
    with pytest.raises(InputError, match="row 4 is out of range: there are 4 rows"):
        opened.read([0, 4])
    with pytest.raises(InputError, match="mask must have length 4"):
        opened.read([True, False])
    with pytest.raises(InputError, match="slice, a vector of integers"):
        opened.read([0.5])
    with pytest.raises(InputError, match="batch_rows"):
        next(opened.iter_batches(0))


def test_clip_retrieval_layout_round_trip(tmp_path: Path) -> None:
    image, text = matrix(7, dtype="float16"), matrix(7, dtype="float16", seed=1)
    captions = [f"caption {i}" for i in range(7)]
    files = write_clip_retrieval(
        tmp_path / "set", image=image, text=text, metadata={"caption": captions}, rows_per_shard=3
    )
    names = {str(path.relative_to(tmp_path / "set")) for path in files}
    assert names >= {"img_emb/img_emb_0.npy", "text_emb/text_emb_2.npy", "metadata/metadata_1.parquet"}
    assert np.array_equal(np.load(tmp_path / "set/img_emb/img_emb_1.npy", allow_pickle=False), image[3:6])
    assert np.array_equal(open_embeddings(tmp_path / "set", kind="image").numpy(), image)
    assert np.array_equal(open_embeddings(tmp_path / "set", kind="text").numpy(), text)
    assert np.array_equal(open_embeddings(tmp_path / "set" / "text_emb").numpy(), text)
    assert read_metadata(tmp_path / "set", ["caption"], rows=7).column("caption").to_pylist() == captions
    with pytest.raises(DataError, match="has both img_emb and text_emb: pass kind='image' or kind='text'"):
        open_embeddings(tmp_path / "set")
    with pytest.raises(DataError, match="7 rows for 8 embeddings"):
        read_metadata(tmp_path / "set", rows=8)


def test_a_lone_side_of_a_clip_retrieval_folder_needs_no_kind(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "set", text=matrix(3))
    assert open_embeddings(tmp_path / "set").rows == 3
    with pytest.raises(DataError, match="has text_emb but no img_emb"):
        open_embeddings(tmp_path / "set", kind="image")
    with pytest.raises(InputError, match="kind must be"):
        open_embeddings(tmp_path / "set", kind="audio")


def test_clip_retrieval_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image 3, text 4"):
        write_clip_retrieval(tmp_path / "set", image=matrix(3), text=matrix(4))
    overflowing = matrix(3) * 1e6
    with pytest.raises(DataError, match="overflows float16"):
        write_clip_retrieval(tmp_path / "set", image=matrix(3), text=overflowing, dtype="float16", rows_per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_columns_and_tensors_can_be_named(tmp_path: Path) -> None:
    a, b = matrix(4, seed=1), matrix(4, seed=2)
    save_file({"a": torch.from_numpy(a), "b": torch.from_numpy(b)}, str(tmp_path / "x.safetensors"))
    assert np.array_equal(open_embeddings(tmp_path / "x.safetensors", column="b").numpy(), b)
    lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), 5) for name, v in (("a", a), ("b", b))}
    pq.write_table(pa.table(lists), tmp_path / "x.parquet")
    assert np.array_equal(open_embeddings(tmp_path / "x.parquet", column="a").numpy(), a)
    pq.write_table(pa.table({"text": ["s"] * 4, "vector": lists["b"]}), tmp_path / "y.parquet")
    assert np.array_equal(open_embeddings(tmp_path / "y.parquet").numpy(), b)


def test_arrays_tensors_and_sets_are_wrapped() -> None:
    rows = matrix(6)
    assert np.array_equal(open_embeddings(rows[::2]).numpy(), rows[::2])
    assert np.array_equal(open_embeddings(torch.from_numpy(rows).T).numpy(), rows.T)
    opened = open_embeddings(rows)
    assert open_embeddings(opened) is opened
    next(opened.iter_batches())[:] = 0
    assert np.array_equal(opened.numpy(), rows)  # batches are copies
    for wrong in (rows[0], rows.astype(int), rows.astype(">f4"), [[1.0]], rows.astype(object), None):
        with pytest.raises(InputError):
            open_embeddings(wrong)
    assert open_embeddings(np.empty((0, 3), np.float32)).rows == 0


def test_fingerprint_follows_content_not_names(tmp_path: Path) -> None:
    rows = matrix(50)
    first = open_embeddings(store(tmp_path / "a.npy", rows)).fingerprint()
    assert open_embeddings(store(tmp_path / "b.npy", rows)).fingerprint() == first
    assert open_embeddings(store(tmp_path / "c.safetensors", rows)).fingerprint() == first
    np.save(tmp_path / "f.npy", np.asfortranarray(rows))
    assert open_embeddings(tmp_path / "f.npy").fingerprint() == first
    assert open_embeddings(rows).fingerprint() == first
    changed = rows.copy()
    changed[31, 2] += 1e-6
    others = [rows[:49], changed, rows.astype("float64"), rows[::-1], rows.reshape(25, 10)]
    prints = {open_embeddings(other).fingerprint() for other in others}
    assert len(prints) == len(others)
    assert first not in prints


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_fingerprint_of_a_large_shard_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    from aniso_ext.data import columns

    rows = matrix(4000)
    opened = open_embeddings(store(tmp_path / f"a{suffix}", rows))
    changed = rows.copy()
    changed[-1] = 0
    other = open_embeddings(store(tmp_path / f"b{suffix}", changed))
    for module in (shards_module, columns):
        monkeypatch.setattr(module, "SAMPLED_BYTES", 1000)
    assert opened.fingerprint() == open_embeddings(tmp_path / f"a{suffix}").fingerprint()
    assert opened.fingerprint() != other.fingerprint()


def test_streaming_needs_the_memory_of_one_batch(tmp_path: Path) -> None:
    rows = np.zeros((200_000, 128), np.float16)  # 51 MB
    np.save(tmp_path / "c.npy", rows)
    np.save(tmp_path / "f.npy", np.asfortranarray(rows))
    store(tmp_path / "p.parquet", rows, row_group=200_000)
    code = (
        "import re, sys; from aniso_ext.data import open_embeddings; import pyarrow.parquet\n"
        # not getrusage: its maximum starts from the process that started this one
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "for name in sys.argv[2:]:\n"
        "    opened = open_embeddings(f'{sys.argv[1]}/{name}'); next(opened.iter_batches(5000)); before = peak()\n"
        "    opened.fingerprint()\n"
        "    rows = sum(len(batch) for batch in opened.iter_batches(5000)); print(name, rows, peak() - before)\n"
    )
    limits = {"c.npy": 4 << 10, "p.parquet": 24 << 10, "f.npy": 24 << 10}
    command = [sys.executable, "-c", code, str(tmp_path), *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    for line in done.stdout.splitlines():
        name, count, grown = line.split()
        assert int(count) == 200_000
        assert int(grown) <= limits[name], f"{name}: peak memory grew by {grown} KiB while 51 MB were read"


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = store(tmp_path / "x.npy", matrix(100))
    batches = open_embeddings(path).iter_batches(10)
    next(batches)
    with open(path, "r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError, match="became shorter while it was being read"):
        list(batches)


def test_real_embeddings_open(real_data: Path) -> None:
    opened = open_embeddings(real_data / "fashion44k" / "text.npy")
    assert isinstance(opened, EmbeddingSet)
    assert (opened.rows, opened.width, opened.stored_dtype) == (43_662, 512, "float16")
    stored = np.load(real_data / "fashion44k" / "text.npy", mmap_mode="r", allow_pickle=False)
    assert np.array_equal(opened.read(slice(43_000, None)), stored[43_000:])


@pytest.mark.parametrize("few", [0, 5, 1024])
def test_scattered_rows_are_the_same_read_one_by_one_or_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    monkeypatch.setattr(shards_module, "FEW_ROWS", few)
    wanted = np.array([299, 0, 17, 17, 4, 298])
    for suffix, dtype in ((".npy", "float16"), (".safetensors", "bfloat16"), (".safetensors", "float32")):
        with EmbeddingWriter(tmp_path / f"{dtype}{suffix}", dtype=dtype) as writer:
            writer.write(rows)
        opened = open_embeddings(tmp_path / f"{dtype}{suffix}")
        whole = np.concatenate(list(opened.iter_batches(100)))
        assert np.array_equal(opened.read(wanted), whole[wanted])
        assert opened.read(wanted[:0]).shape == (0, 7)
        with opened.shards[0].path.open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(DataError, match=rf"{dtype}{suffix}: (became shorter|cannot be mapped)"):
            opened.read(wanted)
