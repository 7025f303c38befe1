"""`aniso train`, `aniso eval` and `aniso ladder` from files to files, on tiny language models."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import aniso_ext as aniso
from aniso_ext.cli.main import app
from aniso_ext.data import EncoderRecord
from aniso_ext.mllm import Correction

WIDTH = 8
COLOURS = ("red", "blue", "green", "black")


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and images of four colours, one step apart; the last 16 pairs are for the test."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    centres = 3 * np.eye(4, WIDTH)
    rows = centres[np.arange(64) % 4] + 0.1 * random.standard_normal((64, WIDTH))
    for name, part, step in (("text", rows[:48], 0.0), ("image", rows[:48], 0.5), ("test", rows[48:], 0.5)):
        moved = part + step
        np.save(folder / f"{name}.npy", (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32))
    lines(folder / "ids.jsonl", [{"id": str(row)} for row in range(48)])
    lines(folder / "test_ids.jsonl", [{"id": str(row)} for row in range(48, 64)])
    lines(folder / "train.jsonl", [{"id": str(row), "caption": COLOURS[row % 4]} for row in range(48)])
    asked = {"kind": "attribute", "attribute": "colour", "question": "Describe the image."}
    for name, ids in (("questions", range(48, 64)), ("validation", range(8))):
        lines(folder / f"{name}.jsonl", [{**asked, "id": str(row), "answer": COLOURS[row % 4]} for row in ids])
    source, target = np.load(folder / "text.npy"), np.load(folder / "image.npy")
    EncoderRecord("toy", "toy", None, None, WIDTH, True, (8, 8), "none").write(folder)
    aniso.make_aligner("mean_shift").fit(source, target).save_pretrained(folder / "aligner")
    return folder


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_train_and_eval(world: Path, tmp_path: Path) -> None:
    files: tuple[object, ...] = ("--source-embeddings", world / "text.npy", "--index", world / "ids.jsonl")
    files += ("--conversations", world / "train.jsonl")
    small = ("--model", "llama:tiny", "--device", "cpu", "--global-batch", 16, "--projector-learning-rate", 5e-3)
    small += ("--learning-rate", 5e-3)
    trained = run(
        "train", *small, *files, "--aligner", world / "aligner", "--projector-epochs", 30, "--epochs", 30,
        "--output", tmp_path / "run", "--json",
    )  # fmt: skip
    report = json.loads(trained.stdout)
    assert [stage["steps"] for stage in report["stages"]] == [90, 90] and report["aligner_fingerprint"]
    assert (tmp_path / "run" / "encoder.json").read_bytes() == (world / "encoder.json").read_bytes()
    judged = run(
        "eval", "--run", tmp_path / "run", "--embeddings", world / "test.npy", "--index", world / "test_ids.jsonl",
        "--questions", world / "questions.jsonl", "--out", tmp_path / "results", "--device", "cpu",
    )  # fmt: skip
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["scores"]
    # four colours in clusters far apart, whose one step the aligner takes back: chance is a quarter
    assert scores["attribute:colour"]["value"] > 0.8
    assert len((tmp_path / "results" / "predictions.jsonl").read_text().splitlines()) == 16
    assert "attribute:colour" in judged.stdout
    other = ("--embeddings", world / "test.npy", "--questions", "x", "--out", tmp_path / "none")
    error = run("eval", "--run", world, *other, code=1).stderr
    assert error.count("\n") == 1 and "holds no trained model" in error
    near = ("--neighbours", 3, "--max-steps", 2, "--output", tmp_path / "near")
    assert "--target-embeddings" in run("train", *small, *files, *near, code=2).output
    near = (*near, "--target-embeddings", world / "image.npy", "--json")
    mark = json.loads(run("train", *small, *files, *near).stdout)["aligner_fingerprint"]
    text, image = np.load(world / "text.npy"), np.load(world / "image.npy")
    assert mark == Correction.nearest(text, image, neighbours=3).fingerprint
    error = run("train", *small, *files, "--aligner", world / "no", "--output", tmp_path / "other", code=1).stderr
    assert error.count("\n") == 1 and str(world / "no") in error


def test_ladder(world: Path, tmp_path: Path) -> None:
    options = (
        "ladder", "--source", world / "text.npy", "--target", world / "image.npy", "--ids", world / "ids.jsonl",
        "--conversations", world / "train.jsonl", "--test", world / "test.npy", "--test-ids", world / "test_ids.jsonl",
        "--questions", world / "questions.jsonl", "--validation-questions", world / "validation.jsonl",
        "--size", "tiny", "--steps", 120, "--batch", 16, "--rate", 5e-3, "--device", "cpu", "--seeds", 1,
        "--out", tmp_path, "--json",
    )  # fmt: skip
    arms = [part for name in ("blind", "identity", "noise", "mean_shift", "images") for part in ("--arm", name)]
    found = json.loads(run(*options, *arms).stdout)
    assert list(found["scores"]) == ["blind", "identity", "noise", "mean_shift", "images"]
    score = {arm: scores["attribute"][0] for arm, scores in found["scores"].items()}
    assert score["blind"] <= 0.5 < score["images"] and found["chosen"]["noise"].startswith("noise-0.0")
    table = (tmp_path / "ladder.md").read_text()
    assert table.count("\n| ") == 5 and "attribute: " in table
    with (tmp_path / "ladder.csv").open() as file:
        values = {(row["arm"], row["score"]): float(row["value"]) for row in csv.DictReader(file)}
    assert values["images", "attribute"] == pytest.approx(score["images"])
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    before = (tmp_path / "images" / "seed-0" / "result.json").stat().st_mtime_ns
    assert json.loads(run(*options, *arms).stdout)["scores"] == found["scores"]
    assert (tmp_path / "images" / "seed-0" / "result.json").stat().st_mtime_ns == before, "finished runs are taken over"
    assert "unknown arm 'best'" in run(*options, "--arm", "best", code=1).stderr
    near = json.loads(run(*options, "--arm", "identity", "--arm", "images", "--neighbours", 3).stdout)["scores"]
    assert list(near) == ["identity", "identity-neighbours", "images"]
    # neighbours have the colour of the text but for chance, so that the reader learns what the images show
    assert near["identity-neighbours"]["attribute"][0] > 0.8
    run(*options, "--arm", "realign-neighbours", "--unpaired", world / "test.npy")
    strangers = np.load(tmp_path / "neighbours" / "realign-5.npy")
    test = np.load(world / "test.npy").astype(np.float64)
    # each is the mean of some five of the 16 other rows
    sums = np.stack([test[list(five)].sum(axis=0) for five in combinations(range(16), 5)])
    sums /= np.linalg.norm(sums, axis=1, keepdims=True)
    assert np.abs(strangers[:, None] - sums).max(axis=2).min(axis=1).max() < 1e-6


def test_train_with_arms_is_the_ladder_with_the_options_of_a_training(world: Path, tmp_path: Path) -> None:
    options = (
        "train", "--model", "llama:tiny", "--source-embeddings", world / "text.npy", "--target-embeddings",
        world / "image.npy", "--index", world / "ids.jsonl", "--conversations", world / "train.jsonl", "--questions",
        world / "questions.jsonl", "--test-index", world / "test_ids.jsonl", "--stages", "full", "--max-steps", 2,
        "--global-batch", 16, "--device", "cpu", "--json",
    )  # fmt: skip
    judged = ("--test-embeddings", world / "test.npy")
    found = json.loads(run(*options, *judged, "--arms", "blind,mean_shift", "--output", tmp_path / "arms").stdout)
    assert {arm: len(scores["attribute"]) for arm, scores in found["scores"].items()} == {"blind": 3, "mean_shift": 3}
    result = json.loads((tmp_path / "arms" / "mean_shift" / "seed-2" / "result.json").read_text())
    (stage,) = result["train"]["stages"]
    assert (stage["name"], stage["steps"]) == ("full", 2)
    assert "--test-embeddings" in run(*options, "--arms", "blind", "--output", tmp_path / "a", code=2).output
    refused = run(*options, *judged, "--arms", "blind", "--noise", 0.1, "--output", tmp_path / "a", code=2).output
    assert "each arm has its own" in " ".join(refused.replace("│", " ").split())
    error = run(*options, *judged, "--arms", "noise", "--output", tmp_path / "a", code=1).stderr
    assert "validation questions" in error
