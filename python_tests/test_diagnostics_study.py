"""A study holds what its parts measure, is written and read back unchanged, and the command line makes the same one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import aniso_ext as aniso
from aniso_ext import diagnostics
from aniso_ext.cli.main import app
from aniso_ext.diagnostics import Study, StudyOptions
from aniso_ext.errors import AnisoError, DataError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
WIDTH, ROWS = 24, 300
FAST = StudyOptions(k=5, bootstrap=0, oracle_pairs=60, row_pairs=100)
runner = CliRunner()


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    return aniso.worlds.simulate_gap(ROWS, world=aniso.worlds.GapWorld.small(WIDTH), seed=5)


@pytest.fixture(scope="module")
def aligner(pairs: tuple[np.ndarray, np.ndarray]) -> aniso.AnisoAlign:
    return aniso.AnisoAlign(rank=8, refine=False).fit(*pairs)


@pytest.fixture(scope="module")
def found(pairs: tuple[np.ndarray, np.ndarray], aligner: aniso.AnisoAlign) -> Study:
    y, x = pairs
    return diagnostics.study(
        y, x, methods={"closed": aligner.transform, "shift": y - y.mean(axis=0) + x.mean(axis=0)},
        frame=aligner.frame_, options=FAST,
    )  # fmt: skip


def run(*words: Any) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def one_error_line(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    (line,) = (line for line in result.stderr.splitlines() if "warning" not in line)
    return line


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN is NaN."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def test_it_holds_what_the_parts_measure(
    found: Study, pairs: tuple[np.ndarray, np.ndarray], aligner: aniso.AnisoAlign
) -> None:
    y, x = pairs
    assert list(found.methods) == ["identity", "closed", "shift"]
    assert found.gap == diagnostics.gap(y, x, basis=aligner.frame_.basis)
    assert found.methods["closed"] == diagnostics.alignment(y, x, aligner.transform(y), k=5)
    assert found.oracle is not None and found.oracle == diagnostics.oracle_path(y, x, k=5, max_pairs=60)
    assert found.phases is not None and found.phases.rank == 8 and found.corrections is not None
    shift = np.linalg.norm(y.mean(axis=0) - x.mean(axis=0))
    assert found.corrections.lengths["shift"].mean == pytest.approx(shift, abs=1e-6)
    assert set(found.measured.seconds) >= {"gap", "alignment", "oracle path"}
    assert "k=5" in found.origin.command and "'closed'" in found.origin.command


def test_only_the_judged_rows_are_read_and_transformed(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = pairs
    seen: list[int] = []

    class Counted:
        rows, width = ROWS, WIDTH

        def read(self, rows: slice | np.ndarray) -> np.ndarray:
            seen.append(len(y[rows]))
            return y[rows]

    def transform(rows: np.ndarray) -> np.ndarray:
        seen.append(-len(rows))
        return rows

    options = StudyOptions(k=5, max_pairs=50, bootstrap=0, oracle=False, rows=False)
    study = diagnostics.study(Counted(), x, methods={"same": transform}, options=options)
    assert -50 in seen and {count for count in seen if count > 0} == {ROWS, 50}
    assert (study.gap.n, study.methods["same"].n, study.methods["same"].n_available) == (ROWS, 50, ROWS)
    chosen = np.sort(np.random.default_rng(0).choice(ROWS, 50, replace=False))
    expected = diagnostics.alignment(y[chosen], x[chosen], y[chosen], k=5)
    assert study.methods["same"].m_z == expected.m_z


def test_json_and_back_is_the_same_study(found: Study, tmp_path: Path) -> None:
    written = found.save(tmp_path / "report", figures=False)
    assert [path.name for path in written] == ["report.html", "report.json", "report.md"]
    for source in (tmp_path / "report", written[1], written[1].read_text()):
        again = Study.from_json(source)
        assert same(again.to_dict(), found.to_dict())
    assert again.gap == found.gap and again.oracle == found.oracle and again.corrections == found.corrections
    assert again.methods == found.methods and again.measured == found.measured and again.phases == found.phases
    assert str(again.verdict) == str(found.verdict)


def test_an_undefined_number_is_null_and_back(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    y, _ = pairs
    text = json.dumps(diagnostics.study(y, y, options=StudyOptions(k=1, bootstrap=0, rows=False)).to_dict())
    values = json.loads(text)
    assert values["gap"]["a_r"] is None and values["methods"][0]["m_z"] is None
    assert np.isnan(Study.from_json(text).gap.a_r)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda values: values.pop("format"), "no report of a study"),
        (lambda values: values.update(version=99), "version 99"),
        (lambda values: values["gap"].pop("g_mu"), "gap lacks g_mu"),
        (lambda values: values["gap"].update(n="many"), "gap.n cannot be 'many'"),
        (lambda values: values["gap"].update(intervals=[1]), "gap.intervals"),
        (lambda values: values.update(methods={"a": 1}), "methods must be a list"),
        (lambda values: values["measured"].update(options=None), "measured.options must be an object"),
    ],
)
def test_a_damaged_report_is_refused_with_the_place(
    found: Study, tmp_path: Path, damage: Callable[[dict[str, Any]], Any], says: str
) -> None:
    values = json.loads(json.dumps(found.to_dict()))
    damage(values)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=str(path)) as caught:
        Study.from_json(path)
    assert says in str(caught.value)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        Study.from_json(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(DataError, match="no JSON object"):
        Study.from_json(tmp_path)


@pytest.mark.parametrize("name", ["identity", "source", "target", ""])
def test_names_that_are_taken_are_refused(pairs: tuple[np.ndarray, np.ndarray], name: str) -> None:
    with pytest.raises(InputError, match="may not be called"):
        diagnostics.study(*pairs, methods={name: pairs[0]})


def test_bad_input_is_an_error_that_says_what_to_do(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = pairs
    bad = y.copy()
    bad[7, 3] = np.nan
    for arguments, methods, says in (
        ((y[:-1], x), {}, "299 rows but target has 300"),
        ((y[:4], x[:4]), {}, "4 pairs are too few: at least 6"),
        ((bad, x), {}, "first in row 7"),
        ((y, x), {"cut": y[:-1]}, "cut has 299"),
        ((y, x), {"cut": lambda rows: rows[:-1]}, r"cut made \[299, 24\] of \[300, 24\] source rows"),
    ):
        with pytest.raises(AnisoError, match=says):
            diagnostics.study(*arguments, methods=methods, options=FAST)
    with pytest.raises(InputError, match="'b', which is no method"):
        diagnostics.study(y, x, methods={"a": y}, bounds={"b": 1.0}, options=FAST)


def test_warnings_name_the_method_and_come_once(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = pairs
    with pytest.warns(diagnostics.DiagnosticsWarning) as caught:
        study = diagnostics.study(y, x, methods={"long": 2 * y}, options=FAST)
    texts = [str(one.message) for one in caught]
    assert sum("long: the result has 300 rows that are not unit vectors" in text for text in texts) == 1
    assert tuple(texts) == study.warnings
    assert Path(caught[0].filename).name == Path(__file__).name


def test_it_prints_and_shows_itself(found: Study) -> None:
    text = str(found)
    assert "closed" in text and f"{found.gap.g_mu:.3f}" in text and found.verdict["premise"].sentence in text
    shown = found._repr_html_()
    assert len(shown) < 20_000 and "closed" in shown and "<table>" in shown


def test_a_comparison_names_its_studies(found: Study, tmp_path: Path) -> None:
    for place in ("x/report", "y/report"):
        found.save(tmp_path / place, figures=False)
    paths = [tmp_path / "x" / "report", tmp_path / "y" / "report" / "report.json"]
    comparison = diagnostics.compare([*paths, found])
    assert list(comparison.studies) == ["x/report", "y/report", "study 3"]
    values = json.loads((comparison.save(tmp_path / "compared", figures=False)[1]).read_text())
    assert [one["name"] for one in values["studies"]] == list(comparison.studies)
    assert list(diagnostics.compare({"a": found, "b": paths[0]}).studies) == ["a", "b"]
    with pytest.raises(InputError, match="two studies or more, got 1"):
        diagnostics.compare([found])


@pytest.fixture(scope="module")
def files(pairs: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("study with spaces")
    paths = {name: folder / f"{name}.npy" for name in ("source", "target", "short", "bad")}
    bad = pairs[0].copy()
    bad[11] = np.nan
    for name, rows in zip(paths, (*pairs, pairs[0][:-1], bad), strict=True):
        np.save(paths[name], rows)
    for name, model in (
        ("shift", aniso.make_aligner("mean_shift")),
        ("closed", aniso.AnisoAlign(rank=8, refine=False)),
    ):
        paths[name] = model.fit(*pairs).save_pretrained(folder / name)
    return paths


QUICK = ("--k", "5", "--bootstrap", "0", "--no-oracle", "--no-figures")


def test_the_command_writes_the_report_and_says_the_verdict(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    pair = ("--source", files["source"], "--target", files["target"])
    result = run("diagnose", *pair, "--aligner", files["shift"], files["closed"], "--transformed", files["target"],
                 "--out", out, *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    study = Study.from_json(out)
    # a file called target gets a name that is not the target's
    assert list(study.methods) == ["identity", "mean_shift", "anisoalign", "target.npy"]
    assert study.origin.methods["mean_shift"] == str(files["shift"]) and study.oracle is None
    assert f"{files['source']} → {files['target']}: 300 pairs of width 24; 3 methods" in result.stdout
    for finding in study.verdict.findings:
        assert finding.sentence in result.stdout
    # the recorded command gives the same numbers
    words = shlex.split(study.origin.command)
    assert words[:2] == ["aniso", "diagnose"]
    assert run(*words[1:-1], tmp_path / "again").exit_code == 0
    again = Study.from_json(tmp_path / "again")
    assert again.methods == study.methods and again.gap == study.gap


def test_the_command_compares_finished_reports(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("diagnose", "--source", files["source"], "--target", files["target"], "--out", tmp_path / name,
                   *QUICK).exit_code == 0  # fmt: skip
    result = run("diagnose", "--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--no-figures")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["report.html", "report.json"]
    assert "nowhere" in one_error_line(
        run("diagnose", "--compare", tmp_path / "a", tmp_path / "nowhere", "--out", tmp_path / "d")
    )
    assert "two studies" in one_error_line(run("diagnose", "--compare", tmp_path / "a", "--out", tmp_path / "d"))
    for words in (("--source", files["source"]), ("--aligner", files["shift"])):
        mixed = run("diagnose", "--compare", tmp_path / "a", *words, "--out", tmp_path / "d")
        assert mixed.exit_code == 2 and "finished reports" in mixed.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--source", "source", "--target", "short"), 1, "300 rows of width 24, the target 299"),
        (("--source", "source", "--target", "target", "--k", "300"), 1, "at least 301 are needed"),
        (("--source", "bad", "--target", "target"), 1, "first in row 11"),
        (("--source", "source", "--target", "target", "--transformed", "short"), 1, "short.npy has 299 rows"),
        (("--source", "source"), 2, "--target"),
        (("--target", "target"), 2, "--source"),
        (("--source", "source", "--target", "target", "--device", "abacus"), 2, "torch cannot use 'abacus'"),
        (("--source", "source", "--target", "target", "stray"), 2, "aligners follow --aligner"),
        (("--source", "source", "--target", "target", "--bootstrap", "-1"), 2, "--bootstrap"),
    ],
)
def test_bad_input_ends_the_command_before_it_writes(
    files: dict[str, Path], tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    given = [files.get(word, word) for word in words]
    result = run("diagnose", *given, "--out", tmp_path / "out", "--no-figures")
    assert result.exit_code == code and says in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()
