"""The demo on rendered shapes, in seconds: what it writes, what its numbers are made of, and how it treats folders."""

from __future__ import annotations

import csv
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import aniso_ext as aniso
from aniso_ext.cli.demo_shapes import ShapesDemo
from aniso_ext.cli.demo_story import next_commands, verdicts
from aniso_ext.cli.main import app
from aniso_ext.data import open_embeddings
from aniso_ext.mllm.arms import Ladder, choose_arms

SMALL = ("--scenes", "80", "--encoder-steps", "3", "--steps", "4", "--seeds", "2", "--jobs", "1", "--arms")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    if not all(find_spec(name) for name in ("open_clip", "transformers", "matplotlib")):
        pytest.skip("needs the extras encode, mllm and plots")
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run(*SMALL, "noise,mean_shift,mean_shift-neighbours", "--out", folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_file_that_is_named_at_the_end_is_there(told: tuple[Path, Any]) -> None:
    folder, result = told
    for name in ("README.md", "ladder.png", "ladder.csv", "demo.json", "world/", "stand_ins/"):
        assert name in result.stdout.split("written in")[1] and (folder / name).exists()
    assert all(f"[{step}/5]" in result.stdout for step in range(1, 6))
    scores = json.loads((folder / "demo.json").read_text())["scores"]
    assert list(scores) == ["blind", "identity", "noise", "mean_shift", "mean_shift-neighbours", "images"]
    with (folder / "ladder.csv").open() as file:
        rows = {(row["arm"], row["score"], int(row["seed"])): float(row["value"]) for row in csv.DictReader(file)}
    assert rows["images", "attribute", 1] == pytest.approx(scores["images"]["attribute"][1], rel=1e-4)
    # levels of noise are tried with one seed, the chosen one with both
    runs = sorted(len(list(place.iterdir())) for place in (folder / "ladder").glob("noise-*"))
    assert runs == [*([1] * (len(choose_arms(["noise"])) - 1)), 2]


def test_the_commands_that_it_ends_with_run(
    told: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = told
    monkeypatch.chdir(tmp_path)
    shown = " ".join(result.stdout.split())
    assert all(" ".join(line.split(" ", 1)[1].split()) in shown for line in next_commands(folder, "aniso"))
    diagnose, train, _ = (shlex.split(line)[1:] for line in next_commands(folder, "aniso"))
    shorter = ["--max-pairs", "30", "--k", "5", "--bootstrap", "0", "--no-figures", "--no-oracle"]
    for words in ([*diagnose, *shorter], [*train, "--max-steps", "2", "--global-batch", "8", "--device", "cpu"]):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 0, found.output
    assert (tmp_path / "report" / "report.html").is_file() and (tmp_path / "run" / "config.json").is_file()


def test_methods_saw_no_pairs_and_models_no_validation_scene_and_no_test_scene(told: tuple[Path, Any]) -> None:
    folder, _ = told
    demo = ShapesDemo(scenes=80)
    trained = {line["embedding"] for line in lines(folder / "ladder" / "conversations.jsonl")}
    validation = {line["id"] for line in lines(folder / "ladder" / "validation.jsonl")}
    test = {line["id"] for line in lines(folder / "world" / "test" / "questions.jsonl")}
    assert (len(trained), len(validation), len(test)) == (80 - demo.validation, demo.validation, demo.test)
    assert not trained & validation and not (trained | validation) & test
    texts = open_embeddings(folder / "world" / "train_text" / "text_emb").numpy()
    pictures = open_embeddings(folder / "world" / "train_image" / "img_emb").numpy()
    aligner = aniso.load_aligner(folder / "ladder" / "aligners" / "mean_shift")
    shift = pictures.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)
    moved = texts[:5] + shift
    expected = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(aligner.transform(texts[:5]), expected, atol=1e-5)
    # neighbours are among the pictures of other scenes, by direction from the means
    standins = aligner.transform(texts).astype(np.float64)
    away = pictures - pictures.mean(axis=0, dtype=np.float64)
    cosines = (standins - standins.mean(axis=0)) @ (away / np.linalg.norm(away, axis=1, keepdims=True)).T
    near = pictures[np.argsort(-cosines[:5], axis=1)[:, :5]].astype(np.float64).sum(axis=1)
    found = np.load(folder / "ladder" / "neighbours" / "mean_shift-5.npy")[:5]
    np.testing.assert_allclose(found, near / np.linalg.norm(near, axis=1, keepdims=True), atol=1e-5)
    own = np.load(folder / "bound" / "img_emb.npy")
    assert own.shape == pictures.shape and np.abs(own - pictures).max() > 1e-3, "the bound's pictures are others"


def test_an_earlier_demo_is_replaced_and_other_files_are_not(told: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    error = run(*SMALL, "mean_shift", "--out", tmp_path, code=1).stderr
    assert error.count("\n") == 1 and "--out" in error and (tmp_path / "letter.txt").read_text() == "dear"
    folder, _ = told
    (folder / "mine.txt").write_text("kept")
    found = json.loads(run(*SMALL, "mean_shift", "--seeds", "1", "--out", folder, "--json").stdout)
    assert list(found["scores"]) == ["blind", "identity", "mean_shift", "images"]
    assert (folder / "mine.txt").read_text() == "kept" and not list((folder / "ladder").glob("noise-*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--world", "shapes", "--pairs", "200"), "--pairs"),
        (("--world", "gap", "--steps", "3"), "--steps"),
        (("--pairs", "200", "--arms", "noise"), "--arms"),
    ],
)
def test_an_option_of_the_other_world_is_refused(arguments: tuple[str, ...], named: str) -> None:
    assert named in run(*arguments, code=2).output


def test_an_unknown_arm_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    assert "unknown arm 'best'" in run("--arms", "best", "--out", tmp_path / "new", code=1).stderr
    assert not (tmp_path / "new").exists()


def test_a_margin_is_over_the_better_floor_and_its_spread_that_of_the_difference() -> None:
    scores = {"blind": [0.2, 0.4], "identity": [0.1, 0.2], "realign": [0.6, 0.8], "images": [0.9, 0.9]}
    (found,) = verdicts(Ladder({arm: {"attribute": values} for arm, values in scores.items()}, {}))
    assert (found["arm"], found["over"]) == ("realign", "blind")
    assert found["margin"] == pytest.approx(0.7 - 0.3)
    # two independent pairs .2 apart: each has variance .02, their difference .04
    assert found["spread"] == pytest.approx(0.04**0.5)
    assert found["recovered"] == pytest.approx((0.7 - 0.15) / (0.9 - 0.15))
