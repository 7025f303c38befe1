"""open_clip for real, with random weights: rows against the library's own calls, photos, local weights, the command."""

from __future__ import annotations

import json
import os
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import aniso_ext as aniso
from aniso_ext.cli.main import app
from aniso_ext.data import EncoderRecord, open_embeddings, read_metadata
from aniso_ext.encode import Encoder, embed_files
from aniso_ext.encode.library import open_clip
from aniso_ext.errors import DataError, InputError
from aniso_ext.worlds.shapes import DualEncoder, DualEncoderOptions, ShapesWorld
from aniso_ext.worlds.shapes.dual_encoder import untrained_dual_encoder

pytestmark = pytest.mark.skipif(find_spec("open_clip") is None, reason="needs the extra encode")

WORLD = ShapesWorld(seed=2)
HALF = 2.0**-11
"""Relative rounding of float16; coordinates of unit rows are at most 1."""
runner = CliRunner()


@pytest.fixture(scope="module")
def small() -> DualEncoder:
    return untrained_dual_encoder(WORLD, options=DualEncoderOptions(width=32, image_width=8, text_width=32))


@pytest.fixture(scope="module")
def folder(small: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save(tmp_path_factory.mktemp("encoder"))


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_line(*arguments: str | Path) -> str:
    result = runner.invoke(app, [*map(str, arguments)])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


def first_photos(real_data: Path, count: int) -> list[dict[str, Any]]:
    lines = (real_data / "fashion_photos" / "captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def test_rows_of_a_published_architecture_are_those_of_the_librarys_own_calls(real_data: Path, tmp_path: Path) -> None:
    pairs = first_photos(real_data, 9)
    place = real_data / "fashion_photos"
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps({**pair, "image": str(place / pair["image"])}) + "\n" for pair in pairs))
    encoder = Encoder.load("ViT-S-32-alt", pretrained="none", seed=3)
    embed_files(encoder, tmp_path / "out", images=table, captions=table, batch_rows=4, workers=0, dtype="float32")

    library = open_clip()
    torch.manual_seed(3)
    model, _, preprocess = library.create_model_and_transforms("ViT-S-32-alt", pretrained_text=False)
    model.eval()
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(place / pair["image"])) for pair in pairs])
        expected = {
            "image": model.encode_image(images, normalize=True),
            "text": model.encode_text(library.get_tokenizer("ViT-S-32-alt")([pair["caption"] for pair in pairs]), True),
        }
    for kind, rows in expected.items():
        found = open_embeddings(tmp_path / "out", kind=kind).numpy()
        assert found.shape == (9, 256) and found.dtype == np.float32
        # the same products, summed over batches of another size: twelve layers of fp32 rounding
        assert np.abs(found - rows.numpy()).max() < 1e-5
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    record = EncoderRecord.read(tmp_path / "out" / "encoder.json")
    assert (record.model, record.pretrained, record.width, record.image_size) == ("ViT-S-32-alt", None, 256, (224, 224))
    assert record.library == f"open_clip {library.__version__}"


def test_the_command_embeds_all_photos_in_order_with_worker_processes(
    real_data: Path, folder: Path, small: DualEncoder, tmp_path: Path
) -> None:
    place = real_data / "fashion_photos"
    table = place / "captions.jsonl"
    report = run_json(
        "embed", "--images", table, "--captions", table, "--out", tmp_path / "out", "--model", f"local-dir:{folder}",
        "--workers", "2", "--batch-rows", "64", "--rows-per-shard", "150",
    )  # fmt: skip
    assert (report["rows"], report["shards"], report["bad"], report["sides"]) == (400, 3, [], ["image", "text"])
    pairs = first_photos(real_data, 400)
    metadata = read_metadata(tmp_path / "out", rows=400)
    assert metadata.column("image").to_pylist() == [pair["image"] for pair in pairs]
    assert metadata.column("caption").to_pylist() == [pair["caption"] for pair in pairs]
    sizes = [Image.open(place / pair["image"]).size for pair in pairs]
    assert list(zip(*metadata.select(["width", "height"]).to_pydict().values(), strict=True)) == sizes
    expected = small.embed_texts([pair["caption"] for pair in pairs])
    assert np.abs(open_embeddings(tmp_path / "out", kind="text").numpy() - expected).max() < HALF
    images = open_embeddings(tmp_path / "out", kind="image").numpy().astype(np.float64)
    assert np.abs(np.linalg.norm(images, axis=1) - 1).max() < np.sqrt(32) * HALF


def test_pictures_on_disk_and_in_memory_have_the_same_embeddings_and_encoder(
    folder: Path, small: DualEncoder, tmp_path: Path
) -> None:
    scenes = WORLD.scenes(12, split="test")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for scene in scenes:
        Image.fromarray(WORLD.render(scene)).save(pictures / f"{scene.id}.png")
    encoder = Encoder.load(f"local-dir:{folder}")
    report = embed_files(encoder, tmp_path / "out", images=pictures, workers=0, dtype="float32")
    assert report.encoder == small.record().name
    assert read_metadata(tmp_path / "out").column("id").to_pylist() == [scene.id for scene in scenes]
    rows = open_embeddings(tmp_path / "out", kind="image").numpy()
    assert np.abs(rows - WORLD.embed_images(small, scenes)).max() < 1e-5


def test_a_saved_dual_encoder_loads_as_it_was(folder: Path, small: DualEncoder) -> None:
    texts = ["a small red circle on a white background", "three crosses"]
    assert np.array_equal(DualEncoder.load(folder).embed_texts(texts), small.embed_texts(texts))


@pytest.fixture
def registered(folder: Path, tmp_path: Path) -> str:
    """The small architecture under a name of its own in open_clip."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "shapes-test.json").write_text(json.dumps(config))
    open_clip().add_model_config(tmp_path / "shapes-test.json")
    return "shapes-test"


def test_local_weights_name_the_encoder_whatever_their_file(
    registered: str, small: DualEncoder, tmp_path: Path
) -> None:
    weights = {name: value.clone() for name, value in small.model.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    loaded = [Encoder.load(registered, checkpoint=tmp_path / f"weights{suffix}") for suffix in (".safetensors", ".pt")]
    assert loaded[0].record == loaded[1].record
    assert loaded[0].record.checkpoint == small.record().checkpoint
    tokens = loaded[0].tokenizer(["a red ring"])
    assert np.array_equal(loaded[0].encode_texts(tokens).numpy(), loaded[1].encode_texts(tokens).numpy())
    assert np.abs(loaded[0].encode_texts(tokens).numpy() - small.embed_texts(["a red ring"])).max() < 1e-6
    other = Encoder.load(registered, pretrained="none", seed=1)
    assert other.record.name != loaded[0].record.name
    assert Encoder.load(registered, pretrained="none", seed=1).record == other.record


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickled_code_in_weights_is_refused_and_not_run(registered: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Harmful(tmp_path / "made")}, tmp_path / "harmful.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "made")))
    for name in ("harmful.pt", "plain.pth"):
        with pytest.raises(InputError, match=f"open_clip cannot load {registered} with .*{name}"):
            Encoder.load(registered, checkpoint=tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_models_and_weights_that_are_not_there_are_named(registered: str, tmp_path: Path) -> None:
    for arguments, reason in (
        ({"model": "ViT-X"}, "open_clip has no model 'ViT-X': it has .*ViT-B-32"),
        ({"model": registered}, "no weights named for shapes-test: pass"),
        ({"model": registered, "pretrained": "laion"}, "has no weights 'laion' for shapes-test: it has none"),
        ({"model": registered, "checkpoint": tmp_path / "no.pt"}, "no.pt is not a file"),
        ({"model": registered, "pretrained": "none", "checkpoint": tmp_path}, "exclude each other"),
        ({"model": f"local-dir:{tmp_path}", "pretrained": "none"}, "brings its own weights"),
        ({"model": f"local-dir:{tmp_path}/nowhere"}, "open_clip cannot load local-dir"),
    ):
        with pytest.raises(InputError, match=reason):
            Encoder.load(**arguments)  # type: ignore[arg-type]


def test_a_folder_without_weights_is_refused_rather_than_random(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(InputError, match=r"open_clip cannot load local-dir:.*could not be loaded"):
        Encoder.load(f"local-dir:{tmp_path}")


def test_a_missing_library_and_an_absent_device_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="torch cannot use device 'nowhere'"):
        Encoder.load(f"local-dir:{folder}", device="nowhere")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r"pip install 'aniso_ext\[encode\]'"):
        Encoder.load(f"local-dir:{folder}")


def test_half_precision_stays_near_and_is_part_of_the_run(folder: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(WORLD.captions(scene)[0] + "\n" for scene in WORLD.scenes(8)))
    exact, half = (Encoder.load(f"local-dir:{folder}", precision=name) for name in ("fp32", "bf16"))
    embed_files(exact, tmp_path / "exact", captions=captions, workers=0, dtype="float32")
    embed_files(half, tmp_path / "half", captions=captions, workers=0, dtype="float32")
    rows = [open_embeddings(tmp_path / name, kind="text").numpy() for name in ("exact", "half")]
    cosine = (rows[0] * rows[1]).sum(axis=1)
    assert np.abs(rows[0] - rows[1]).max() > 0
    # a dozen roundings of relative size 2^-9 on the way
    assert cosine.min() > 1 - 12 * 2.0**-9
    with pytest.raises(DataError, match="was started with precision fp32, now it is bf16"):
        embed_files(half, tmp_path / "exact", captions=captions, workers=0, dtype="float32")


@pytest.fixture(scope="module")
def sets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Captions embedded by two encoders, and pictures by the first."""
    place = tmp_path_factory.mktemp("sets")
    scenes = WORLD.scenes(48)
    (place / "captions.txt").write_text("".join(WORLD.captions(scene)[0] + "\n" for scene in scenes))
    (place / "pictures").mkdir()
    for scene in scenes:
        Image.fromarray(WORLD.render(scene)).save(place / "pictures" / f"{scene.id}.png")
    options = DualEncoderOptions(width=32, image_width=8, text_width=32, seed=1)
    other = untrained_dual_encoder(WORLD, options=options).save(place / "other encoder")
    for name, model, given in (
        ("texts", folder, {"captions": place / "captions.txt"}),
        ("images", folder, {"images": place / "pictures"}),
        ("others", other, {"captions": place / "captions.txt"}),
    ):
        embed_files(Encoder.load(f"local-dir:{model}"), place / name, **given, workers=0, dtype="float32")
    np.save(place / "nameless.npy", open_embeddings(place / "texts", kind="text").numpy())
    halves = {"texts": "text_emb", "images": "img_emb", "others": "text_emb"}
    return {**{name: place / name / half for name, half in halves.items()}, "nameless": place / "nameless.npy"}


def fit(source: Path, target: Path, out: Path, *more: str) -> list[str | Path]:
    return ["fit", "--source", source, "--target", target, "--out", out, "--method", "mean_shift", *more]


def test_fit_keeps_the_encoder_of_both_sets_and_convert_refuses_another(sets: dict[str, Path], tmp_path: Path) -> None:
    name = EncoderRecord.read(sets["texts"].parent / "encoder.json").name
    assert run_json(*fit(sets["texts"], sets["images"], tmp_path / "a"))["encoder"] == name
    assert json.loads((tmp_path / "a" / "config.json").read_text())["encoder"] == name
    convert = ["convert", "--aligner", tmp_path / "a", "--output", tmp_path / "out", "--input"]
    line = error_line(*convert, sets["others"])
    other = EncoderRecord.read(sets["others"].parent / "encoder.json").name
    assert f"holds embeddings of {other}, but the aligner was fitted on {name}" in line
    assert run_json(*convert, sets["texts"])["rows"] == 48
    convert[4] = tmp_path / "again"
    assert run_json(*convert, sets["nameless"])["rows"] == 48


def test_fit_refuses_sets_of_two_encoders_and_a_name_that_is_not_theirs(sets: dict[str, Path], tmp_path: Path) -> None:
    line = error_line(*fit(sets["others"], sets["images"], tmp_path / "a"))
    assert "holds embeddings of local-dir sha256:" in line and "embed both sides with one encoder" in line
    line = error_line(*fit(sets["texts"], sets["images"], tmp_path / "a", "--encoder", "ViT-B-32"))
    assert "--encoder is ViT-B-32, but both sets hold embeddings of local-dir sha256:" in line
    assert not (tmp_path / "a").exists()


def test_a_set_without_a_record_fits_with_any_and_leaves_the_encoder_unnamed(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    assert run_json(*fit(sets["nameless"], sets["images"], tmp_path / "a"))["encoder"] is None
    assert run_json(*fit(sets["nameless"], sets["images"], tmp_path / "b", "--encoder", "mine"))["encoder"] == "mine"


def test_a_damaged_or_misplaced_record_is_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.eye(8, 16))
    record = tmp_path / "encoder.json"
    record.write_text((sets["texts"].parent / "encoder.json").read_text())
    aligner = aniso.make_aligner("mean_shift").fit(np.eye(8, 16), np.eye(8, 16))
    aligner.encoder_ = "some encoder"
    with pytest.raises(DataError, match=r"has width 16, but encoder\.json beside it is of an encoder of width 32"):
        aniso.convert_embeddings(aligner, tmp_path / "rows.npy", tmp_path / "out")
    record.write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"encoder\.json: is no record of an encoder \(KeyError: 'model'\)"):
        aniso.convert_embeddings(aligner, tmp_path / "rows.npy", tmp_path / "out")


def test_training_finds_pairs_among_held_out_scenes_and_moves_the_modalities_together() -> None:
    options = DualEncoderOptions(width=32, image_width=8, text_width=32, steps=45, batch_rows=64, learning_rate=4e-3)
    scenes = WORLD.scenes(200, split="test")
    steps: list[tuple[int, int]] = []
    before, after = (
        untrained_dual_encoder(WORLD, options=options),
        WORLD.train_dual_encoder(options=options, progress=lambda step, total: steps.append((step, total))),
    )
    found = []
    for encoder in (before, after):
        texts, images = WORLD.embed(encoder, scenes)
        similarity = texts @ images.T
        ranks = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
        found.append((float((ranks < 10).mean()), float(np.linalg.norm(texts.mean(axis=0) - images.mean(axis=0)))))
    assert steps[-1] == (45, 45)
    # ten of 200 by chance: .05 with a standard deviation of .015
    assert found[0][0] < 0.05 + 5 * 0.0155 < found[1][0]
    assert 0.05 < found[1][1] < found[0][1]


def test_training_is_the_same_to_the_bit() -> None:
    options = DualEncoderOptions(width=16, image_width=8, text_width=32, steps=2, batch_rows=8)
    first, again = (WORLD.train_dual_encoder(options=options) for _ in range(2))
    assert first.record() == again.record()
    assert (
        first.record() != WORLD.train_dual_encoder(options=DualEncoderOptions(**{**vars(options), "seed": 1})).record()
    )
