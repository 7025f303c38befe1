"""Verification and preview of a conversion: every byte that is wrong is found and named; a preview writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from convert_deaths import SummingAffine
from test_convert_embeddings import Affine, bad_input, contents, make_input

from aniso_ext.convert import convert_embeddings, preview_conversion, verify_conversion
from aniso_ext.convert.memory import batch_rows_within, needed_memory, parse_size
from aniso_ext.data import EmbeddingWriter, open_embeddings
from aniso_ext.errors import DataError, InputError, StoppedError


def patch_manifest(folder: Path, shard: str, **entries: Any) -> None:
    """Change entries of one line."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("shard") == shard:
            line.update(entries)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / "manifest.jsonl").write_text(text)


@pytest.mark.parametrize("rows", ["all", "sample"])
@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
@pytest.mark.parametrize("suffix, dtype", [(".npy", "float16"), (".parquet", "float32"), (".safetensors", "bfloat16")])
def test_what_was_converted_is_verified(
    tmp_path: Path, suffix: str, dtype: str, calibration: str, rows: str
) -> None:
    make_input(tmp_path / "in", suffix, dtype)
    options = {"batch_rows": 4, "calibration": calibration}
    for aligner in (Affine(), SummingAffine()):
        output = tmp_path / type(aligner).__name__
        convert_embeddings(aligner, tmp_path / "in", output, **options)
        before = contents(output)
        report = verify_conversion(aligner, tmp_path / "in", output, rows=rows, **options)
        assert (report.shards, report.rows, report.checked_rows) == (4, 22, 22)
        assert contents(output) == before
    shares = [verify_conversion(aligner, tmp_path / "in", output, worker=(rank, 2), **options) for rank in range(2)]
    assert [report.checked_rows for report in shares] == [10, 12]


@pytest.mark.parametrize("on_bad", ["drop", "zero"])
@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_dropped_and_zeroed_rows_are_where_they_should_be(tmp_path: Path, on_bad: str, batch_rows: int) -> None:
    bad_input(tmp_path / "in")
    options: dict[str, Any] = {"on_bad": on_bad, "batch_rows": batch_rows}
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", **options)
    report = verify_conversion(Affine(), tmp_path / "in", tmp_path / "out", **options)
    assert report.checked_rows == report.rows == (10 if on_bad == "drop" else 13)
    patch_manifest(tmp_path / "out", "b.npy", bad_rows=[2, 9])
    with pytest.raises(DataError, match=r"b\.npy: row 5 is bad in the input or in the manifest, but not in both"):
        verify_conversion(Affine(), tmp_path / "in", tmp_path / "out", **options)


def test_a_sample_takes_evenly_spaced_batches(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 6))
    convert_embeddings(Affine(), rows, tmp_path / "z.npy", batch_rows=10)
    report = verify_conversion(Affine(), rows, tmp_path / "z.npy", rows="sample", batch_rows=10)
    assert report.checked_rows == 80
    for row, found in ((3, True), (15, False), (195, True)):  # batches 0, 1 and 19 of 20
        convert_embeddings(Affine(), rows, tmp_path / "z.npy", batch_rows=10, on_existing="overwrite")
        change_row(tmp_path / "z.npy", row, tmp_path / "z.npy.manifest.jsonl")
        if found:
            with pytest.raises(DataError, match=f"row {row} is not the stand-in"):
                verify_conversion(Affine(), rows, tmp_path / "z.npy", rows="sample", batch_rows=10)
        else:
            verify_conversion(Affine(), rows, tmp_path / "z.npy", rows="sample", batch_rows=10)
        with pytest.raises(DataError, match=f"row {row} is not the stand-in"):
            verify_conversion(Affine(), rows, tmp_path / "z.npy", batch_rows=10)


def change_row(path: Path, row: int, manifest: Path) -> None:
    """Change the last bit of one number, and the manifest along with it."""
    rows = np.load(path)
    rows.view(np.uint64)[row, 4] ^= 1
    np.save(path, rows)
    header, line = [json.loads(text) for text in manifest.read_text().splitlines()]
    line["xxh3_128"] = xxhash.xxh3_128(rows.tobytes()).hexdigest()
    manifest.write_text("".join(json.dumps(text, separators=(",", ":")) + "\n" for text in (header, line)))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_dtype(path: Path) -> None:
    rows = open_embeddings(path).numpy()
    with EmbeddingWriter(path, dtype="float64", overwrite=True) as writer:
        writer.write(rows)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (flip_bit, r"part_1\.npy: has xxh3_128 [0-9a-f]{32}, it should be [0-9a-f]{32}: remove the file and convert"),
        (Path.unlink, r"part_1\.npy: is in the manifest but not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"part_1\.npy: is truncated"),
        (other_dtype, r"part_1\.npy: has dtype float64, it should be float32"),
        (
            lambda path: patch_manifest(path.parent, "part_1.npy", rows=6),
            r"part_1\.npy: has rows 5, it should be 6",
        ),
    ],
    ids=["bit", "lost", "cut", "dtype", "rows"],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    want = contents(tmp_path / "out")
    spoil(tmp_path / "out" / "part_1.npy")
    with pytest.raises(DataError, match=reason):
        verify_conversion(Affine(), tmp_path / "in", tmp_path / "out")
    if spoil in (flip_bit, other_dtype):  # what the message says to do
        (tmp_path / "out" / "part_1.npy").unlink()
    if reason.endswith("6"):
        patch_manifest(tmp_path / "out", "part_1.npy", rows=5)
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == want


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    with pytest.raises(DataError, match=r"part_0\.npy: is one of 4 shards of 4 that are not finished"):
        verify_conversion(Affine(), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "out", worker=(0, 2))
    with pytest.raises(DataError, match=r"part_0\.npy: is one of 2 shards of 4"):
        verify_conversion(SummingAffine(), tmp_path / "in", tmp_path / "out")
    convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "out", worker=(1, 2))
    with pytest.raises(DataError, match="was started with aligner"):
        verify_conversion(Affine(3.0), tmp_path / "in", tmp_path / "out")
    with pytest.raises(StoppedError, match="stopped before all shards were verified"):
        verify_conversion(Affine(), tmp_path / "in", tmp_path / "out", stop=lambda: True)


def test_a_preview_says_what_a_conversion_would_do_and_writes_nothing(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    plan = preview_conversion(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4, dtype="float16", worker=(1, 2))
    assert not (tmp_path / "out").exists()
    assert (plan.shards, plan.rows, plan.bytes_in, plan.bytes_out) == (4, 22, 22 * 6 * 4, 22 * 6 * 2)
    assert (plan.share_shards, plan.share_rows) == ((2, 2), (10, 12))
    assert (plan.done_shards, plan.rows_left, plan.batch_rows) == (0, 12, 4)
    assert plan.rows_per_second > 0
    assert plan.seconds_left == pytest.approx(12 / plan.rows_per_second)
    json.dumps(plan.to_dict())
    report = convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4, dtype="float16")
    assert (report.outputs, report.manifest) == (plan.outputs, plan.manifest)
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.npy")) == plan.bytes_out + 4 * 128


def test_a_preview_counts_what_is_done_and_every_pass(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "out", worker=(0, 2))
    entries = sorted(str(path) for path in (tmp_path / "out").rglob("*"))
    plan = preview_conversion(SummingAffine(), tmp_path / "in", tmp_path / "out")
    assert (plan.done_shards, plan.rows_left) == (2, 12)
    fresh = preview_conversion(SummingAffine(), tmp_path / "in", tmp_path / "other", calibration="corpus")
    assert fresh.seconds_left == pytest.approx(3 * 22 / fresh.rows_per_second)
    again = preview_conversion(SummingAffine(3.0), tmp_path / "in", tmp_path / "out", on_existing="overwrite")
    assert (again.done_shards, again.rows_left) == (0, 22)
    with pytest.raises(DataError, match="was started with aligner"):
        preview_conversion(SummingAffine(3.0), tmp_path / "in", tmp_path / "out")
    assert sorted(str(path) for path in (tmp_path / "out").rglob("*")) == entries


@pytest.mark.parametrize(
    "text, size",
    [("7", 7), ("2GB", 2 * 10**9), ("2g", 2 * 10**9), ("512MiB", 512 << 20), ("1.5 KiB", 1536), ("3TB", 3 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 GB 2", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_memory_decides_the_rows_of_a_batch(tmp_path: Path) -> None:
    rows = np.ones((20_000, 512), np.float16)

    def batch_rows(memory: int, given: int | None = None) -> int:
        plan = preview_conversion(Affine(width=512), rows, tmp_path / "z.npy", memory=memory, batch_rows=given)
        return plan.batch_rows

    assert batch_rows(1 << 40) == 8192
    for memory in (3 << 20, 10 << 20, 70 << 20):
        chosen = batch_rows(memory)
        assert chosen in (64, 128, 256, 512, 1024, 2048, 4096)
        # six copies of the batch in single precision fit, and of twice as many rows do not
        assert 6 * chosen * 512 * 4 <= memory < 6 * 2 * chosen * 512 * 4
    assert batch_rows(10 << 20, 100) == 100
    with pytest.raises(InputError, match=r"memory 10\.49 MB is too little .* of 1000 rows, which need 12\.29 MB"):
        batch_rows(10 << 20, 1000)
    with pytest.raises(InputError, match="too little for batches of 64 rows"):
        batch_rows(100_000)
    with pytest.raises(InputError, match="memory must be a positive integer, got 0"):
        batch_rows(0)


def test_parquet_takes_the_memory_of_a_row_group_too(tmp_path: Path) -> None:
    from aniso_ext.convert.plan import plan_outputs

    embeddings = open_embeddings(np.ones((100, 6), np.float32))
    plain, parquet = (plan_outputs(embeddings, tmp_path / f"z{suffix}", "float32") for suffix in (".npy", ".parquet"))
    assert needed_memory(parquet, 64) - needed_memory(plain, 64) == 64 << 20
    with pytest.raises(InputError, match="too little for batches of 64 rows"):
        batch_rows_within(parquet, 32 << 20, None)
