"""`aniso bench convert`: what it compares computes the same, its table follows from its samples, and it cleans up."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aniso_ext.align import make_aligner
from aniso_ext.bench import convert, records
from aniso_ext.bench.pickled_realign import read_embeddings, realign_records, write_records
from aniso_ext.cli.main import app
from aniso_ext.errors import AnisoError

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTH = 16


def unit_rows(rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH)) + 0.3
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_numpy_over_records_is_our_realign(tmp_path: Path) -> None:
    source, target = unit_rows(500, 0), unit_rows(300, 1)
    (tmp_path / "out").mkdir()
    paths = [tmp_path / "a.pkl", tmp_path / "b.pkl"]
    write_records(paths[0], source[:200], 0)
    write_records(paths[1], source[200:], 200)
    exact = target.astype(np.float64)
    assert realign_records(paths, tmp_path / "out", exact.mean(axis=0), exact.var(axis=0).sum()) == 500
    found = np.concatenate([read_embeddings(tmp_path / "out" / path.name) for path in paths])
    expected = make_aligner("realign").fit(source.astype(np.float64), exact).transform(source.astype(np.float64))
    assert np.abs(found - expected).max() <= np.finfo(np.float32).eps  # records are stored in float32


def test_every_variant_is_timed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    words = ["bench", "convert", "--rows", "700", "--width", str(WIDTH), "--rank", "4", "--rounds", "2"]
    words += ["--pickled-rows", "300", "--device", "cpu", "--scratch", str(tmp_path / "scratch"), "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--commit", "abc"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "scratch").iterdir()) == []
    header, rows = records.read_table(tmp_path / "out" / "cpu_convert.csv")
    assert header["commit"] == "abc" and {"cores", "memory", "load before"} <= header.keys()
    assert [row["variant"] for row in rows] == [variant.name for variant in convert.variants("cpu")]
    found = {row["variant"]: row for row in json.loads(done.stdout)["times"]}
    assert {row["measured_rows"] for row in found.values()} == {700, 300}
    files = found[convert.CONVERT]
    assert files["rows_per_s"] == pytest.approx(700 / files["seconds"])
    assert files["gb_per_s"] == pytest.approx(files["rows_per_s"] * 2 * 2 * WIDTH / 1e9)
    assert files["of_copy"] == pytest.approx(files["rows_per_s"] / found[convert.COPY]["rows_per_s"])
    assert files["of_op"] == pytest.approx(files["rows_per_s"] / found[convert.OP]["rows_per_s"])
    realign = found[convert.REALIGN]
    assert realign["times_pickled"] == pytest.approx(realign["rows_per_s"] / found[convert.PICKLED]["rows_per_s"])
    assert files["peak_mb"] > 10 and found[convert.COPY]["peak_mb"] is None


def test_variants_are_chosen_by_name_or_pattern(tmp_path: Path) -> None:
    assert [v.name for v in convert.select("cuda", ["*buffers", "bus"])] == [convert.BUFFERS, convert.BUS]
    assert convert.select("cpu", []) == convert.variants("cpu")
    words = ["bench", "convert", "--rows", "64", "--width", str(WIDTH), "--rank", "4", "--rounds", "1", "--json"]
    words += ["--device", "cpu", "--scratch", str(tmp_path / "scratch")]
    done = CliRunner().invoke(app, [*words, "--variant", "*, files", "--variant", "cp"])
    assert done.exit_code == 0, done.output
    found = {row["variant"]: row for row in json.loads(done.stdout)["times"]}
    assert list(found) == [convert.COPY, convert.CONVERT, convert.REALIGN]
    assert found[convert.CONVERT]["of_copy"] > 0 and found[convert.CONVERT]["of_op"] is None
    wrong = CliRunner().invoke(app, [*words, "--variant", "buss"])
    assert wrong.exit_code == 2 and convert.CONVERT in wrong.output.replace("\n", " ")


def test_nothing_is_timed_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def shifted(paths: list[Path], folder: Path, mean: np.ndarray, trace: float) -> int:
        return realign_records(paths, folder, mean + 0.1, trace)

    monkeypatch.setattr(convert, "realign_records", shifted)
    options = convert.Options(WIDTH, 4, 1, 100, "cpu", tmp_path)
    with pytest.raises(AnisoError, match=r"realign and NumPy over records differ by .* nothing was timed"):
        convert.measure(200, options, lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_files_are_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "convert", "--rows", str(10**13), "--scratch", str(tmp_path)])
    assert done.exit_code == 1 and "name another folder with --scratch" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_page_derives_its_estimate_from_the_rates(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("render", REPOSITORY / "benchmarks" / "render_readme.py")
    assert specification is not None and specification.loader is not None
    render = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(render)
    times = []
    for rows, rate in ((1000, 1e5), (4000, 2e5)):
        time = convert.ConversionTime(rows, 512, 128, convert.CONVERT, rows, rows / rate, 0.1, 0.2, rate, 0.5)
        time.of_copy, time.of_op, time.peak_mb = 0.5, 0.875, 512.0
        times.append(asdict(time))
    facts = {"device": "Test", "memory": "1 GB", "rounds": "3", "load before": "0.1"}
    facts |= {"torch": "2", "date": "today", "commit": "abc"}
    records.write_table(tmp_path / "convert.csv", facts, times)
    text = render.conversion_tables([tmp_path / "convert.csv", tmp_path / "none.csv"])
    assert "| 4,000 | anisoalign, files | 200,000 | 0.50 | 50% | 88% |  |  | 512 MB |" in text
    # 10^9 rows of 1024 bytes at 200,000 rows/s
    assert "1.02 TB" in text and "machine 1.4 hours at the rate of the 4,000 rows" in text and "them 5 minutes" in text
