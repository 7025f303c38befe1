"""From files to embedding sets: rows, order, bad samples, resumed and refused runs, with a toy for the model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_encoder import DEATH, OPTIONS, WIDTH, Towers, tokenizer, toy_encoder, transform

from aniso_ext.data import EncoderRecord, open_embeddings, read_metadata
from aniso_ext.encode import EmbedReport, embed_files
from aniso_ext.encode.inputs import read_samples
from aniso_ext.errors import DataError, InputError, StoppedError

ROUNDING = 1e-6
"""Of unit rows in float32: products of 192 terms in another order, and a division."""


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 pictures whose natural order is not that of their names as text."""
    folder = tmp_path / "photos"
    for number in range(24):
        path = folder / f"part_{number // 11}" / f"photo_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (20 + number, 12)).save(path)
    return folder


def embed(output: Path, **options: Any) -> EmbedReport:
    return embed_files(toy_encoder(), output, **{**OPTIONS, **options})


def image_row(path: Path) -> np.ndarray:
    """By the definition: one image alone, in float64."""
    with Image.open(path) as image:
        flat = transform(image.convert("RGB")).double().flatten().numpy()
    row = flat @ Towers(0).image.double().numpy()
    return row / np.linalg.norm(row)


def text_row(text: str) -> np.ndarray:
    row = tokenizer([text]).double().numpy()[0] @ Towers(0).text.double().numpy()
    return row / np.linalg.norm(row)


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_those_of_the_images_in_natural_order(photos: Path, tmp_path: Path) -> None:
    report = embed(tmp_path / "out", images=photos)
    assert (report.rows, report.shards, report.sides, report.width) == (24, 4, ("image",), WIDTH)
    names = [f"part_{number // 11}/photo_{number}" for number in range(24)]
    metadata = read_metadata(tmp_path / "out", rows=24)
    assert metadata.column("id").to_pylist() == names
    assert metadata.column("image").to_pylist() == [f"{name}.png" for name in names]
    assert metadata.column("width").to_pylist() == [20 + number for number in range(24)]
    assert set(metadata.column("height").to_pylist()) == {12}
    embeddings = open_embeddings(tmp_path / "out", kind="image")
    assert [shard.rows for shard in embeddings.shards] == [7, 7, 7, 3]
    expected = np.stack([image_row(photos / f"{name}.png") for name in names])
    assert np.abs(embeddings.numpy() - expected).max() < ROUNDING


def test_worker_processes_change_nothing(photos: Path, tmp_path: Path) -> None:
    embed(tmp_path / "alone", images=photos)
    embed(tmp_path / "workers", images=photos, workers=2)
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "workers")


def test_float16_is_the_rounded_row(photos: Path, tmp_path: Path) -> None:
    embed(tmp_path / "single", images=photos)
    embed(tmp_path / "half", images=photos, dtype="float16")
    single, half = (open_embeddings(tmp_path / name, kind="image").numpy() for name in ("single", "half"))
    assert half.dtype == np.float16
    assert np.array_equal(half, single.astype(np.float16))


def damage(folder: Path) -> dict[str, str]:
    """Files that no decoder can use, and what is said of them."""
    buffer = io.BytesIO()
    picture(0, (64, 64)).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:700])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.jpg").touch()
    buffer = io.BytesIO()
    picture(0, (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[200:400] = bytes(200)
    (folder / "flipped.png").write_bytes(content)
    return {
        "truncated.jpg": "cannot be decoded (OSError: image file is truncated",
        "text.png": "not an image",
        "empty.jpg": "file is empty",
        "flipped.png": "cannot be decoded",
        "missing.jpg": "file is missing",
    }


def test_bad_samples_are_left_out_on_both_sides_and_listed(tmp_path: Path) -> None:
    reasons = damage(tmp_path)
    picture(1).save(tmp_path / "good.png")
    rows = [{"id": name, "image": name, "caption": f"caption of {name}"} for name in reasons]
    rows += [{"id": "no path", "caption": "words"}, {"id": "no words", "image": "good.png"}]
    rows += [
        {"id": "blank", "image": "good.png", "caption": " \n"},
        {"id": "fine", "image": "good.png", "caption": "x"},
    ]
    reasons |= {"no path": "no image path", "no words": "no caption", "blank": "empty caption"}
    table = write_lines(tmp_path / "pairs.jsonl", rows)
    report = embed(tmp_path / "out", images=table, captions=table)
    assert [(bad.row, bad.id) for bad in report.bad] == list(enumerate(reasons))
    for bad in report.bad:
        assert bad.reason.startswith(reasons[bad.id]), bad
    assert (report.rows, report.samples, report.shards) == (1, 9, 2)
    assert read_metadata(tmp_path / "out", rows=1).to_pylist() == [
        {"id": "fine", "caption": "x", "image": "good.png", "width": 20, "height": 12}
    ]
    assert (
        np.abs(open_embeddings(tmp_path / "out", kind="image").numpy()[0] - image_row(tmp_path / "good.png")).max()
        < 1e-6
    )
    assert np.abs(open_embeddings(tmp_path / "out", kind="text").numpy()[0] - text_row("x")).max() < 1e-6
    with pytest.raises(
        DataError, match=r"sample 'truncated.jpg' \(truncated.jpg\), row 0: cannot be decoded .* mend it"
    ):
        embed(tmp_path / "strict", images=table, captions=table, on_bad="fail")
    assert not (tmp_path / "strict").exists()


def test_an_input_without_one_good_sample_is_an_error(tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(DataError, match="none of the 4 samples can be used; the first, 'empty': file is empty"):
        embed(tmp_path / "out", images=tmp_path)


def test_rows_that_come_out_not_finite_are_bad(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Towers.encode_image

    def overflowing(self: Towers, images: torch.Tensor) -> torch.Tensor:
        rows = encode(self, images)
        rows[1:2] = torch.inf
        return rows

    monkeypatch.setattr(Towers, "encode_image", overflowing)
    report = embed(tmp_path / "out", images=photos, rows_per_shard=3)
    assert [(bad.row, bad.reason) for bad in report.bad] == [
        (row, "embedding is not finite") for row in range(1, 24, 3)
    ]
    assert report.rows == 16


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "I;16", "LA"])
def test_every_mode_of_pixels_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else picture(0).convert(mode)
    image.save(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"))
    assert embed(tmp_path / "out", images=tmp_path).rows == 1


UNUSUAL = [
    "plain words",
    "Ünïcödé – “quotes”",
    "猫と犬 🐈‍⬛🦴",
    "שלום عليكم",
    "tab\tand nul\0inside",
    "line\u2028separator\x0bhere",
    "&lt;b&gt; <image> </s> <|endoftext|>",
    "word " * 5_000,
    "%s {} \\n \"'",
    "a",
]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_unusual_captions_keep_their_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"captions{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(UNUSUAL) + "\n", encoding="utf-8", newline="")
    elif suffix == ".jsonl":
        write_lines(path, [{"caption": text} for text in UNUSUAL])
    else:
        pq.write_table(pa.table({"caption": UNUSUAL}), path)
    report = embed(tmp_path / "out", captions=path)
    assert report.rows == len(UNUSUAL) and not report.bad
    metadata = read_metadata(tmp_path / "out", rows=len(UNUSUAL))
    assert metadata.column_names == ["id", "caption"]
    assert metadata.column("id").to_pylist() == [str(row) for row in range(len(UNUSUAL))]
    assert metadata.column("caption").to_pylist() == UNUSUAL
    rows = open_embeddings(tmp_path / "out", kind="text").numpy()
    assert np.abs(rows - np.stack([text_row(text) for text in UNUSUAL])).max() < ROUNDING


@pytest.mark.parametrize(("where", "number"), [("batch", 1), ("batch", 5), ("shard", 1), ("shard", 3), ("line", 2)])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    photos: Path, tmp_path: Path, where: str, number: int
) -> None:
    embed(tmp_path / "whole", images=photos)
    (photos / "part_0" / "notes.txt").write_text("no image")
    program = Path(__file__).with_name("toy_encoder.py")
    command = [sys.executable, str(program), str(photos), str(tmp_path / "killed"), where, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == DEATH, done.stderr
    for name, content in files_of(tmp_path / "killed").items():
        if not Path(name).name.startswith(".") and name != "embed.jsonl":
            assert content == files_of(tmp_path / "whole")[name]
    report = embed(tmp_path / "killed", images=photos)
    assert report.resumed_shards == {"batch": (number - 1) // 3, "shard": number - 1, "line": number}[where]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_torn_line_is_dropped(photos: Path, tmp_path: Path) -> None:
    embed(tmp_path / "out", images=photos)
    whole = files_of(tmp_path / "out")
    manifest = tmp_path / "out" / "embed.jsonl"
    manifest.write_bytes(whole["embed.jsonl"][:-20])
    assert embed(tmp_path / "out", images=photos).resumed_shards == 3
    assert files_of(tmp_path / "out") == whole


def test_a_stop_ends_the_run_between_shards(photos: Path, tmp_path: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(StoppedError, match=r"stopped after 2 shard\(s\)"):
        embed(tmp_path / "out", images=photos, stop=lambda: next(answers))
    assert embed(tmp_path / "out", images=photos).resumed_shards == 2


def test_another_model_input_or_option_does_not_resume(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(out, images=photos)
    before = files_of(out)
    with pytest.raises(DataError, match="was started with encoder toy 0, now it is toy 1: pass the same"):
        embed_files(toy_encoder(1), out, images=photos, **OPTIONS)
    with pytest.raises(DataError, match="was started with rows per shard 7, now it is 8"):
        embed(out, images=photos, rows_per_shard=8)
    with pytest.raises(DataError, match="has embeddings already"):
        embed(out, images=photos, on_existing="fail")
    picture(99, (33, 33)).save(photos / "part_0" / "photo_3.png")
    with pytest.raises(DataError, match="was started with input"):
        embed(out, images=photos)
    assert files_of(out) == before
    assert embed(out, images=photos, on_existing="overwrite", rows_per_shard=12).shards == 2
    assert {name for name in files_of(out) if "img_emb" in name} == {f"img_emb/img_emb_{part}.npy" for part in (0, 1)}


def test_files_of_someone_else_and_lost_shards_are_not_taken_for_ones_own(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "other" / "img_emb" / "img_emb_0.npy", np.eye(3))
    with pytest.raises(DataError, match=r"has files, but there is no embed\.jsonl"):
        embed(tmp_path / "other", images=photos)
    embed(tmp_path / "out", images=photos)
    (tmp_path / "out" / "img_emb" / "img_emb_1.npy").unlink()
    with pytest.raises(DataError, match=r"shard 1 is recorded, but img_emb/img_emb_1\.npy is missing"):
        embed(tmp_path / "out", images=photos)


def test_the_record_of_the_encoder_is_beside_the_embeddings(photos: Path, tmp_path: Path) -> None:
    embed(tmp_path / "out", images=photos)
    assert EncoderRecord.read(tmp_path / "out" / "encoder.json") == toy_encoder().record


def test_two_inputs_are_joined_by_id_in_the_order_of_the_images(photos: Path, tmp_path: Path) -> None:
    ids = read_samples(photos).ids
    captions = write_lines(tmp_path / "c.jsonl", [{"id": id, "caption": f"about {id}"} for id in reversed(ids)])
    samples = read_samples(photos, captions)
    assert samples.ids == ids and samples.captions == [f"about {id}" for id in ids]
    write_lines(captions, [{"id": id, "caption": "words"} for id in ids[1:]])
    with pytest.raises(
        DataError, match=r"has 24 samples and .* has 23, and id 'part_0/photo_0' is in one of them only"
    ):
        read_samples(photos, captions)


def test_ids_come_from_the_column_the_path_or_the_line(tmp_path: Path) -> None:
    named = write_lines(tmp_path / "named.jsonl", [{"id": 7, "image": "a.png"}, {"id": "b", "image": None}])
    assert read_samples(named).ids == ["7", "b"]
    paths = tmp_path / "paths.txt"
    paths.write_text("x/a.png\r\nx/b.tar.png\n")
    assert read_samples(paths).ids == ["x/a", "x/b.tar"]
    paths.write_text("a.png\na.jpg\n")
    assert read_samples(paths).ids == ["a.png", "a.jpg"]
    assert read_samples(paths).image_path(1) == tmp_path / "a.jpg"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("twice.jsonl", b'{"id": "a", "image": "x"}\n{"id": "a", "image": "y"}\n', "rows 0 and 1 have the same id 'a'"),
        ("other.jsonl", b'{"file": "x"}\n', r"has no column 'image' \(columns: none\)"),
        ("torn.jsonl", b'{"image": "x"}\n{"image"', "line 2 is not JSON"),
        ("list.jsonl", b'["x"]\n', "line 1 is not a JSON object"),
        ("number.jsonl", b'{"image": 3}\n', "row 0 of 'image' is int, not text"),
        ("empty.txt", b"", "has no rows"),
        ("latin.txt", b"caf\xe9.png\n", "cannot be read as UTF-8"),
        ("table.csv", b"image\n", r"has the unknown suffix '\.csv'"),
        ("broken.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_inputs_that_cannot_be_used_are_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
        read_samples(tmp_path / name)


def test_no_input_an_empty_folder_and_impossible_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to embed"):
        read_samples()
    with pytest.raises(DataError, match="has no images"):
        read_samples(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(InputError, match="on_bad must be one of skip, fail, got 'drop'"):
        embed(tmp_path / "out", images=tmp_path, on_bad="drop")
    with pytest.raises(InputError, match="batch_rows must be an integer of at least 1"):
        embed(tmp_path / "out", images=tmp_path, batch_rows=0)
