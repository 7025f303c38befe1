"""Conversion between formats and layouts: rows, names, other columns and metadata arrive as they should."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from aniso_ext.convert import convert_embeddings
from aniso_ext.convert.plan import plan_outputs
from aniso_ext.data import EmbeddingWriter, open_embeddings, write_clip_retrieval
from aniso_ext.data import sinks as sinks_module
from aniso_ext.errors import DataError, InputError

WIDTH = 4
ROWS = np.random.default_rng(0).standard_normal((31, WIDTH)).astype(np.float32)
FORMATS = ["npy", "parquet", "safetensors", "arrow"]


class Negation:
    """z = -y, exact in every dtype."""

    width = WIDTH

    def fingerprint(self) -> str:
        return "negation"

    def transform(self, source: np.ndarray, *, calibration: str | None = "auto") -> np.ndarray:
        return -source

    def calibrated(self, source: Any, *, calibration: str | None = "auto") -> Negation:
        return self


def read_independently(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="np") as file:
            return file.get_tensor("embeddings")
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
    return np.stack(table.column("embedding").to_numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_every_format_becomes_every_format(tmp_path: Path, before: str, after: str, dtype: str) -> None:
    for number, part in enumerate(np.array_split(ROWS, 3)):
        with EmbeddingWriter(tmp_path / "in" / f"emb_{number}.{before}", dtype=dtype) as writer:
            writer.write(part)
    report = convert_embeddings(Negation(), tmp_path / "in", tmp_path / "out", format=after, batch_rows=4)
    assert [Path(path).name for path in report.outputs] == [f"emb_{number}.{after}" for number in range(3)]
    got = [read_independently(Path(path)) for path in report.outputs]
    assert [len(part) for part in got] == [11, 10, 10]
    assert all(part.dtype == dtype for part in got)
    assert np.array_equal(np.concatenate(got), -ROWS.astype(dtype))


def test_arrow_files_of_others_are_read(tmp_path: Path) -> None:
    import pyarrow.feather

    lists = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), WIDTH)
    table = pa.table({"id": range(31), "vector": lists})
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"), chunksize=7)
    pyarrow.feather.write_feather(table, str(tmp_path / "b.feather"), compression="uncompressed")
    for name in ("a.feather", "b.feather"):
        opened = open_embeddings(tmp_path / name)
        assert (opened.rows, opened.width, opened.shards[0].format) == (31, WIDTH, "arrow")
        assert [len(batch) for batch in opened.iter_batches(5)][:2] == [5, 2 if name == "a.feather" else 5]
        assert np.array_equal(opened.numpy(), ROWS)
        assert np.array_equal(opened.read([30, 7, 6]), ROWS[[30, 7, 6]])
    with pytest.raises(InputError, match=r"a\.arrow and a\.feather would both become a\.npy: rename one"):
        (tmp_path / "twice").mkdir()
        (tmp_path / "twice" / "a.feather").write_bytes((tmp_path / "a.feather").read_bytes())
        (tmp_path / "twice" / "a.arrow").write_bytes((tmp_path / "b.feather").read_bytes())
        plan_outputs(open_embeddings(tmp_path / "twice"), tmp_path / "out", "float32", "npy")


def table_with_columns() -> pa.Table:
    """Texts, numbers, nulls, nested and dictionary columns around the embeddings, with metadata of its own."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), WIDTH)
    columns = {
        "id": pa.array(range(31), pa.uint64()),
        "vector": lists,
        "caption": pa.array([None if i % 7 == 0 else f"ü {i}" for i in range(31)], pa.large_string()),
        "kind": pa.array([f"k{i % 3}" for i in range(31)]).dictionary_encode(),
        "boxes": pa.array([[{"x": i, "y": None}] * (i % 3) for i in range(31)]),
        "when": pa.array(range(31), pa.timestamp("us", tz="UTC")),
    }
    return pa.table(columns).replace_schema_metadata({"origin": "a test"})


@pytest.mark.parametrize("on_bad, bad", [("fail", []), ("drop", [0, 6, 7, 20, 30]), ("zero", [0, 30])])
@pytest.mark.parametrize("after", ["parquet", "arrow"])
@pytest.mark.parametrize("before", ["parquet", "arrow"])
def test_other_columns_of_a_table_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, on_bad: str, bad: list[int]
) -> None:
    monkeypatch.setattr(sinks_module, "_GROUP_BYTES", 8 * WIDTH * 4)  # groups of 8 rows
    rows = ROWS.copy()
    rows[bad] = 0
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), WIDTH)
    table = table_with_columns().set_column(1, "vector", lists)
    if before == "parquet":
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=9)
    else:
        with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=9)
    outputs = []
    for batch_rows in (5, 100):
        output = tmp_path / f"out_{batch_rows}"
        convert_embeddings(
            Negation(), tmp_path / f"x.{before}", output, on_bad=on_bad, batch_rows=batch_rows, format=after
        )
        outputs.append((output / f"x.{after}").read_bytes())
    assert outputs[0] == outputs[1]  # whatever the batches
    path = tmp_path / "out_5" / f"x.{after}"
    got = pq.read_table(path) if after == "parquet" else pa.ipc.open_file(path).read_all()
    kept = [i for i in range(31) if on_bad != "drop" or i not in bad]
    want = table.take(kept)
    assert got.column_names == table.column_names
    assert got.schema.metadata == {b"origin": b"a test"}
    for name in ("id", "caption", "kind", "boxes", "when"):
        assert got.schema.field(name).type == table.schema.field(name).type
        assert got.column(name).to_pylist() == want.column(name).to_pylist()
    assert np.array_equal(np.stack(got.column("vector").to_numpy()), -rows[kept])
    if after == "parquet":
        assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(2)] == [8, 8]


def test_columns_that_a_format_cannot_hold_are_named(tmp_path: Path) -> None:
    pq.write_table(table_with_columns(), tmp_path / "x.parquet")
    with pytest.warns(UserWarning, match=r"x\.parquet: npy holds embeddings only, the columns id, caption, kind, bo"):
        convert_embeddings(Negation(), tmp_path / "x.parquet", tmp_path / "out", format="npy")
    assert np.array_equal(np.load(tmp_path / "out" / "x.npy"), -ROWS)


def test_a_source_that_grows_or_shrinks_is_noticed(tmp_path: Path) -> None:
    pq.write_table(table_with_columns(), tmp_path / "x.parquet")
    shard = open_embeddings(tmp_path / "x.parquet").shards[0]
    with pytest.raises(InputError, match=r"30 rows were written beside the 31 of its table"):  # noqa: SIM117
        with EmbeddingWriter(tmp_path / "y.parquet", beside=shard) as writer:
            writer.write(ROWS[:30])
    with pytest.raises(DataError, match=r"x\.parquet: has 31 rows, and row 32 was asked for"):  # noqa: SIM117
        with EmbeddingWriter(tmp_path / "y.parquet", beside=shard) as writer:
            writer.write(np.concatenate((ROWS, ROWS[:1])))
    assert not (tmp_path / "y.parquet").exists()


def clip_folder(folder: Path) -> dict[str, str]:
    """A clip-retrieval folder of three shards with metadata; SHA-256 of the metadata by name."""
    captions = [f"caption {i}" for i in range(31)]
    write_clip_retrieval(folder, image=ROWS, text=ROWS[::-1], metadata={"caption": captions}, rows_per_shard=12)
    return hashes(folder / "metadata")


def hashes(folder: Path) -> dict[str, str]:
    return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in sorted(folder.iterdir())}


@pytest.mark.parametrize("after", [None, "safetensors"])
def test_the_clip_retrieval_layout_goes_in_and_out(tmp_path: Path, after: str | None) -> None:
    metadata = clip_folder(tmp_path / "laion")
    for kind in ("text", "image"):
        convert_embeddings(Negation(), tmp_path / "laion", tmp_path / "out", kind=kind, format=after)
    assert hashes(tmp_path / "out" / "metadata") == metadata
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["img_emb", "metadata", "text_emb"]
    assert np.array_equal(open_embeddings(tmp_path / "out", kind="text").numpy(), -ROWS[::-1])
    assert np.array_equal(open_embeddings(tmp_path / "out", kind="image").numpy(), -ROWS)
    names = [shard.name for shard in open_embeddings(tmp_path / "out", kind="text").shards]
    assert names == [f"text_emb_{number}.{after or 'npy'}" for number in range(3)]
    # half of the layout, named by its folder, is a folder of shards like any other
    convert_embeddings(Negation(), tmp_path / "laion" / "text_emb", tmp_path / "half")
    assert "metadata" not in {entry.name for entry in (tmp_path / "half").iterdir()}


def test_metadata_is_copied_again_where_a_stopped_run_left_none(tmp_path: Path) -> None:
    metadata = clip_folder(tmp_path / "laion")
    out = tmp_path / "out"
    convert_embeddings(Negation(), tmp_path / "laion", out, kind="text")
    (out / "metadata" / "metadata_1.parquet").unlink()
    assert convert_embeddings(Negation(), tmp_path / "laion", out, kind="text").resumed_shards == 3
    assert hashes(out / "metadata") == metadata
    (out / "metadata" / "metadata_1.parquet").write_bytes(b"other")
    before = hashes(out / "text_emb")
    with pytest.raises(DataError, match=r"metadata_1\.parquet: exists already and is not a copy of .*: choose another"):
        convert_embeddings(Negation(), tmp_path / "laion", out, kind="text")
    assert hashes(out / "text_emb") == before
    convert_embeddings(Negation(), tmp_path / "laion", out, kind="text", on_existing="overwrite")
    assert hashes(out / "metadata") == metadata
    with pytest.raises(InputError, match=r"on_bad='drop' would leave .*metadata with more rows.*: pass on_bad='zero'"):
        convert_embeddings(Negation(), tmp_path / "laion", tmp_path / "new", kind="text", on_bad="drop")
    assert not (tmp_path / "new").exists()


def test_outputs_that_would_harm_the_input_are_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path / "laion")
    before = sorted(tmp_path.rglob("*"))
    for input, kind, output, reason in (
        ("laion", "text", "laion", "is both input and output"),
        ("laion", "text", "laion/new", "lies inside the input"),
        ("laion/text_emb", None, "laion/text_emb/new", "lies inside the input"),
        ("laion/text_emb", None, "laion", r"has the clip-retrieval layout \(img_emb and text_emb\)"),
    ):
        with pytest.raises(DataError, match=reason):
            convert_embeddings(Negation(), tmp_path / input, tmp_path / output, kind=kind)
    with pytest.raises(DataError, match="lies inside the input"):
        convert_embeddings(Negation(), tmp_path / "laion" / "text_emb", tmp_path / "laion" / "text_emb", format="arrow")
    with pytest.raises(InputError, match="format must be one of npy, parquet, safetensors, arrow, got 'csv'"):
        convert_embeddings(Negation(), ROWS, tmp_path / "out", format="csv")
    with pytest.raises(InputError, match=r"out\.npy does not have the suffix of format arrow: pass \.arrow"):
        convert_embeddings(Negation(), ROWS, tmp_path / "out.npy", format="arrow")
    with pytest.raises(InputError, match="parquet cannot hold bfloat16: choose another dtype or format"):
        convert_embeddings(Negation(), ROWS, tmp_path / "out", format="parquet", dtype="bfloat16")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_manifest_of_a_half_lies_beside_its_shards(tmp_path: Path) -> None:
    clip_folder(tmp_path / "laion")
    report = convert_embeddings(Negation(), tmp_path / "laion", tmp_path / "out", kind="text")
    header, *lines = map(json.loads, Path(report.manifest).read_text().splitlines())
    assert Path(report.manifest).parent == tmp_path / "out" / "text_emb"
    assert header["shards"] == len(lines) == 3
