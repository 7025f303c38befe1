"""The commands on files of the gap simulator: fit, convert, diagnose, demo and doctor, judged by what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import aniso_ext as aniso
from aniso_ext.cli.main import app

WIDTH, TRAIN, TEST = 64, 1500, 400
METRICS = ("delta_mu", "phi", "psi", "omega", "m_z", "m_x", "a_r", "paired_cosine", "recall_at_1", "recall_at_10")
runner = CliRunner()


def run(*arguments: str | Path) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unpaired training shards, held-out pairs and a fitted aligner."""
    folder = tmp_path_factory.mktemp("cli")
    source, target = aniso.worlds.simulate_gap(TRAIN + TEST, world=aniso.worlds.GapWorld.small(WIDTH), seed=3)
    names = ("source_train", "target_train", "source_test", "target_test", "aligner")
    paths = {name: folder / name for name in names}
    shuffled = np.random.default_rng(0).permutation(TRAIN)
    for name, rows in (
        ("source_train", source[:TRAIN]),
        ("target_train", target[shuffled]),
        ("source_test", source[TRAIN:]),
        ("target_test", target[TRAIN:]),
    ):
        paths[name].mkdir()
        for index, shard in enumerate(np.array_split(rows, 3)):
            np.save(paths[name] / f"part_{index}.npy", shard)
    fitted = run(
        "fit", "--source", paths["source_train"], "--target", paths["target_train"], "--out", paths["aligner"],
        "--rank", "16", "--no-refine",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    return paths


def rows_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def one_error_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("aniso: error: ")
    return line


def test_fit_writes_what_the_library_fits(files: dict[str, Path]) -> None:
    ours = aniso.load_aligner(files["aligner"])
    theirs = aniso.AnisoAlign(rank=16, refine=False).fit(files["source_train"], files["target_train"])
    assert ours.fingerprint() == theirs.fingerprint()
    assert {path.name for path in files["aligner"].iterdir()} == {"config.json", "model.safetensors"}


def test_fit_says_what_it_did(files: dict[str, Path], tmp_path: Path) -> None:
    data = run_json(
        "fit", "--source", files["source_train"], "--target", files["target_train"], "--out", tmp_path / "a",
        "--method", "c3_paper", "--seed", "5", "--encoder", "some encoder",
    )  # fmt: skip
    assert (data["method"], data["width"], data["source"]["rows"]) == ("c3_paper", WIDTH, TRAIN)
    assert data["options"]["seed"] == 5
    assert data["fingerprint"] == aniso.load_aligner(tmp_path / "a").fingerprint()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["encoder"] == "some encoder"


def test_fit_keeps_an_existing_folder_unless_told(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    arguments = ("fit", "--source", files["source_train"], "--target", files["target_train"], "--method", "mean_shift")
    assert "--overwrite" in one_error_line(run(*arguments, "--out", tmp_path))
    assert "exists" in one_error_line(run(*arguments, "--out", tmp_path / "precious.txt", "--overwrite"))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    assert run(*arguments, "--out", tmp_path, "--overwrite").exit_code == 0


SHORT = ("--prior-steps", "12", "--refine-steps", "12", "--batch-rows", "32")


def test_fit_refines_by_default_and_says_what_came_of_it(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("fit", "--source", files["source_train"], "--target", files["target_train"], "--rank", "16", *SHORT)
    state, log = tmp_path / "state", tmp_path / "log"
    data = run_json(*arguments, "--out", tmp_path / "a", "--checkpoint", state, "--log", log)
    aligner = aniso.load_aligner(tmp_path / "a")
    assert data["fingerprint"] == aligner.fingerprint()
    assert data["options"]["refinement_training"]["steps"] == data["summary"]["refiner_steps"] == 12
    assert aligner.refiner_ is not None
    assert {path.name for path in state.iterdir()} == {"prior.pt", "refiner.pt"}
    assert {path.name for path in log.iterdir()} == {"prior.jsonl", "refiner.jsonl"}
    # the same command again goes on from the state, here from the end, and shows the same numbers to people
    again = run(*arguments, "--out", tmp_path / "b", "--checkpoint", state, "--log", log)
    assert again.exit_code == 0, again.output
    assert aniso.load_aligner(tmp_path / "b").fingerprint() == data["fingerprint"]
    for name in ("eps_eff_largest", "similarity_guarantee", "refiner_loss_before", "refiner_loss_after",
                 "prior_loss_after", "collapsed_blocks"):  # fmt: skip
        value = data["summary"][name]
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        assert f"{name.replace('_', ' ')}: {shown}" in again.stdout
    other = run(*arguments, "--seed", "1", "--out", tmp_path / "c", "--checkpoint", state)
    assert "is of another run" in one_error_line(other)


def test_fit_of_what_is_not_trained_refuses_training_options(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("fit", "--source", files["source_train"], "--target", files["target_train"], "--out", tmp_path / "a")
    for more in (("--method", "realign", "--log", tmp_path), ("--no-refine", "--prior-steps", "3")):
        result = run(*arguments, *more)
        assert result.exit_code == 2 and "only anisoalign with refinement is trained" in result.stderr
    result = run(*arguments, "--device", "abacus")
    assert result.exit_code == 2 and "torch cannot use 'abacus'" in result.stderr
    assert not (tmp_path / "a").exists()


def test_the_steps_in_the_help_are_the_defaults() -> None:
    from aniso_ext.align.stages import PRIOR_TRAINING, REFINEMENT_TRAINING
    from aniso_ext.cli import fit

    assert (PRIOR_TRAINING.steps, REFINEMENT_TRAINING.steps) == (fit.PRIOR_STEPS, fit.REFINE_STEPS)
    assert PRIOR_TRAINING.batch_rows == REFINEMENT_TRAINING.batch_rows == fit.TRAINED_ROWS


def test_convert_equals_transform_shard_by_shard(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "stand_ins"
    data = run_json("convert", "--aligner", files["aligner"], "--input", files["source_test"], "--output", out)
    assert data["rows"] == TEST and data["shards"] == 3
    expected = aniso.load_aligner(files["aligner"]).transform(rows_of(files["source_test"]))
    found = rows_of(out)
    assert found.dtype == expected.dtype
    # rows of different batches may be rounded differently in a float32 product of length WIDTH
    np.testing.assert_allclose(found, expected, rtol=0, atol=WIDTH * np.finfo(np.float32).eps)


def test_convert_options_reach_the_pipeline(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "stand_ins"
    arguments = ("convert", "--aligner", files["aligner"], "--input", files["source_test"], "--output", out)
    assert run(*arguments, "--dtype", "float64", "--batch-rows", "7", "--calibration", "corpus").exit_code == 0
    found = rows_of(out)
    expected = aniso.load_aligner(files["aligner"]).transform(rows_of(files["source_test"]), calibration="corpus")
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=WIDTH * np.finfo(np.float32).eps)
    one_error_line(run(*arguments, "--on-existing", "fail"))
    assert run(*arguments, "--on-existing", "overwrite").exit_code == 0
    assert rows_of(out).dtype == np.float32


def test_convert_counts_bad_rows_and_goes_on_only_if_told(files: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of(files["source_test"])[:5].copy()
    rows[3] = np.nan
    np.save(tmp_path / "in.npy", rows)
    arguments = ("convert", "--aligner", files["aligner"], "--input", tmp_path / "in.npy", "--output", tmp_path / "out")
    assert "in.npy" in one_error_line(run(*arguments))
    data = run_json(*arguments, "--on-bad", "zero")
    assert (data["bad_rows"], data["bad_row_indices"]) == (1, {"in.npy": [3]})
    found = rows_of(tmp_path / "out")
    np.testing.assert_array_equal(found[3], 0)
    np.testing.assert_allclose(np.linalg.norm(np.delete(found, 3, axis=0), axis=1), 1, atol=1e-6)


def test_diagnose_reports_the_librarys_numbers(files: dict[str, Path], tmp_path: Path) -> None:
    source, target = files["source_test"], files["target_test"]
    stand_ins = tmp_path / "stand_ins"
    run_json("convert", "--aligner", files["aligner"], "--input", source, "--output", stand_ins)
    shift = tmp_path / "shift"
    run_json("fit", "--source", files["source_train"], "--target", files["target_train"], "--out", shift,
             "--method", "mean_shift")  # fmt: skip
    out = tmp_path / "report"
    data = run_json("diagnose", "--source", source, "--target", target, "--aligner", files["aligner"], shift,
                    "--transformed", stand_ins, "--out", out, "--k", "5")  # fmt: skip

    assert [row["name"] for row in data["methods"]] == ["identity", "anisoalign", "mean_shift", "stand_ins"]
    expected = aniso.diagnostics.alignment(source, target, stand_ins, k=5)
    for metric in METRICS:
        assert data["methods"][3][metric] == pytest.approx(getattr(expected, metric), abs=1e-12), metric
        # the aligner applied on the fly is the conversion, up to float32 rounding and ties that it decides
        assert data["methods"][1][metric] == pytest.approx(getattr(expected, metric), rel=5e-3, abs=5e-3), metric
    gap = aniso.diagnostics.gap(source, target)
    assert data["gap"]["g_mu"] == pytest.approx(gap.g_mu, abs=1e-12)
    assert data["methods"][0]["delta_mu"] == pytest.approx(gap.g_mu, abs=1e-9)
    assert data["methods"][2]["delta_mu"] < 0.2 * gap.g_mu

    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    written = json.loads((out / "report.json").read_text())
    assert written["methods"] == data["methods"] and written["gap"] == data["gap"]
    text = (out / "report.md").read_text()
    assert f"{gap.g_mu:.3f}" in text and f"{expected.psi:.3f}" in text and "| mean_shift |" in text


def test_diagnose_prints_one_line_a_method(files: dict[str, Path], tmp_path: Path) -> None:
    result = run("diagnose", "--source", files["source_test"], "--target", files["target_test"],
                 "--aligner", files["aligner"], "--aligner", files["aligner"], "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sum(line.startswith("identity ") for line in lines) == 1
    assert sum(line.startswith("anisoalign") for line in lines) == 2


def test_diagnose_draws_the_same_rows_of_every_set(files: dict[str, Path], tmp_path: Path) -> None:
    data = run_json("diagnose", "--source", files["source_test"], "--target", files["target_test"],
                    "--transformed", files["target_test"], "--max-pairs", "100", "--out", tmp_path)  # fmt: skip
    assert data["gap"]["n"] == TEST and data["methods"][1]["n"] == 100
    assert data["methods"][1]["paired_cosine"] == pytest.approx(1, abs=1e-6)
    assert data["methods"][1]["recall_at_1"] == 1


def test_diagnose_refuses_sets_that_are_no_pairs(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    line = one_error_line(run("diagnose", "--source", files["source_train"], "--target", files["target_test"],
                              "--out", out))  # fmt: skip
    assert "1,500" in line and "400" in line
    line = one_error_line(run("diagnose", "--source", files["source_test"], "--target", files["target_test"],
                              "--transformed", files["source_train"], "--out", out))  # fmt: skip
    assert "source_train" in line
    assert not out.exists()


@pytest.mark.parametrize("command", ["fit", "convert", "diagnose", "demo"])
def test_a_missing_file_is_one_line_that_names_it(command: str, files: dict[str, Path], tmp_path: Path) -> None:
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    arguments = {
        "fit": ("--source", missing, "--target", files["target_train"], "--out", out, "--no-refine"),
        "convert": ("--aligner", files["aligner"], "--input", missing, "--output", out),
        "diagnose": ("--source", files["source_test"], "--target", missing, "--out", out),
        "demo": ("--source", missing, "--target", files["target_train"], "--out", out),
    }[command]
    assert "nowhere" in one_error_line(run(command, *arguments))
    assert not out.exists()


def test_a_missing_aligner_is_one_line_that_names_it(files: dict[str, Path], tmp_path: Path) -> None:
    result = run("convert", "--aligner", tmp_path / "nobody", "--input", files["source_test"],
                 "--output", tmp_path / "out")  # fmt: skip
    assert "nobody" in one_error_line(result)


def test_embeddings_of_another_encoder_are_refused_with_both_widths(files: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.eye(WIDTH + 2, dtype=np.float32))
    line = one_error_line(run("convert", "--aligner", files["aligner"], "--input", tmp_path / "other.npy",
                              "--output", tmp_path / "out"))  # fmt: skip
    assert str(WIDTH) in line and str(WIDTH + 2) in line


def test_demo_runs_every_method_on_simulated_pairs(tmp_path: Path) -> None:
    result = run("demo", "--pairs", "1200", "--width", "64", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["name"] for row in data["methods"]] == aniso.list_aligners()
    assert (data["width"], data["train_rows"], data["held_out_pairs"]) == (64, 900, 300)
    methods = {row["name"]: row for row in data["methods"]}
    assert methods["identity"]["phi"] == pytest.approx(1, abs=1e-6)
    # the gap is that of all 1 200 pairs; in 300 of them E||m||² grows by E||r||²/300 = .004, and chance stays below .05
    assert methods["identity"]["delta_mu"] == pytest.approx(data["gap"]["g_mu"], abs=0.05)
    for name in ("mean_shift", "realign", "anisoalign"):
        assert methods[name]["delta_mu"] < 0.3 * methods["identity"]["delta_mu"]
    assert sum("unit vectors" in line for line in result.stderr.splitlines()) == 1
    assert "unicorn: the result has" in result.stderr
    # random target rows know nothing of the source: chance level, 3 standard errors of a share of 300
    assert methods["permuted"]["recall_at_10"] < 10 / 300 + 3 * (10 / 300 / 300) ** 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_demo_confirms_the_constants_of_the_paper() -> None:
    data = run_json("demo", "--methods", "identity")
    assert data["width"] == 1280
    wanted = {row["name"]: row["wanted"] for row in data["constants"]}
    paper = {"c_lambda": 0.845, "o_q": 0.441, "g_mu": 0.392, "g_sigma": 0.066, "d_center": 1.264, "a_r": 28.6}
    assert wanted.items() >= paper.items()
    assert wanted["r_res"] == pytest.approx(0.89, abs=5e-3) and wanted["d_eff_ratio"] == 0.284
    for row in data["constants"]:
        assert row["measured"] == pytest.approx(row["wanted"], rel=0.05), row["name"]
        assert row["measured"] == data["gap"][row["name"]]


def test_demo_is_a_function_of_its_seed() -> None:
    def measured(seed: int) -> list[dict[str, Any]]:
        small = ("--pairs", "400", "--width", "64", "--methods", "c3_paper,realign")
        found = run_json("demo", *small, "--seed", str(seed))
        return [{metric: row[metric] for metric in METRICS} for row in found["methods"]]

    assert measured(1) == measured(1) != measured(2)


def test_demo_refines_on_request() -> None:
    small = ("demo", "--pairs", "300", "--width", "24", "--methods", "anisoalign", "--k", "5")
    plain, refined = run_json(*small), run_json(*small, "--refine")
    assert (plain["refine"], refined["refine"]) == (False, True)
    phi = [found["methods"][0]["phi"] for found in (plain, refined)]
    assert phi[0] != phi[1] and abs(phi[0] - phi[1]) < 0.1


def test_demo_on_own_files_splits_pairs_and_prints_a_table(files: dict[str, Path]) -> None:
    result = run("demo", "--source", files["source_test"], "--target", files["target_test"], "--pairs", "300",
                 "--methods", "identity,mean_shift", "--held-out", "0.5", "--k", "5")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "150 unpaired rows a side" in result.stdout and "150 pairs" in result.stdout
    for name in ("identity", "mean_shift"):
        assert sum(line.startswith(name) for line in result.stdout.splitlines()) == 1


def test_doctor_explains_every_backend() -> None:
    data = run_json("doctor")
    assert data["versions"]["aniso_ext"] == aniso.__version__
    backends = data["backends"]
    assert set(backends["available"]) | set(backends["unavailable"]) == {"cuda", "triton", "cpu", "reference"}
    assert all(backends["unavailable"].values())
    chosen = "cpu" if "cpu" in backends["available"] else "reference"
    assert backends["auto"]["cpu"].startswith(f"auto on cpu takes {chosen}")
    assert data["build"]["compiled"] is ("cpu" in backends["available"])
    assert 0 < data["import_seconds"]["aniso_ext"] < data["import_seconds"]["aniso_ext.ops"]
    text = run("doctor").stdout
    assert all(reason[:40] in " ".join(text.split()) for reason in backends["unavailable"].values())


def test_fit_under_torchrun_writes_one_aligner(files, tmp_path):
    """Two processes: one speaks, and the closed form, which they fit together, is that of one process to rounding."""
    options = ["--source", files["source_train"], "--target", files["target_train"], "--rank", "16", "--json"]
    steps = ["--prior-steps", "6", "--refine-steps", "4", "--batch-rows", "128"]
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "aniso_ext.cli"]
        + [str(word) for word in ("fit", *options, *steps, "--out", tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["aligner"] == str(tmp_path / "two")
    one = run_json("fit", *options[:-1], *steps, "--out", tmp_path / "one")
    rows = rows_of(files["source_test"])
    alone, together = (aniso.load_aligner(tmp_path / name) for name in ("one", "two"))
    expected, found = (aligner.closed_form().transform(rows) for aligner in (alone, together))
    # float64 statistics that differ by roundings, then a map in float32: a few roundings of unit rows
    assert np.abs(expected - found).max() <= 16 * np.finfo(np.float32).eps
    assert together.summary_["prior_steps"] == one["summary"]["prior_steps"] == 6
