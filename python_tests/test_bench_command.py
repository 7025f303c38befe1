"""`aniso bench`: tables, files, comparison, failures, and the pages made from its files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aniso_ext.bench import kernels, records, suite
from aniso_ext.bench.ceilings import Ceilings
from aniso_ext.bench.floors import work_of
from aniso_ext.bench.timing import Times
from aniso_ext.bench.variants import Variant
from aniso_ext.cli.main import app
from aniso_ext.errors import DataError
from aniso_ext.ops import backends

REPOSITORY = Path(__file__).resolve().parent.parent
QUICK = ["bench", "kernels", "--rows", "64", "--rounds", "2", "--no-compile", "--backend", "cpu"]
ONE = ["--case", "correct-d512-r128-bf16", "--no-latency"]


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """What the machine can do is another test's matter, and its buffers are large."""
    from aniso_ext.bench import ceilings

    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings._GEMM_SIZE, "cpu", 64)


def synthetic(scale: float = 1.0) -> records.Run:
    """Times that follow from the floor: eager 30, compiled 5, cuda 1.2 and triton 1.8 times as long."""
    ceilings = Ceilings(4250.0, {"bf16": 709.0, "tf32": 438.0})
    rows = []
    for case in suite.CASES:
        floor = work_of(case).floor_ns(ceilings, case.format) * 1000 / 1e9
        factors = {"eager": 30.0, "compiled": 5.0, "cuda": 1.2 * scale, "triton": 1.8}
        times = {name: Times(*(floor * factor * part for part in (1, 0.9, 1.1))) for name, factor in factors.items()}
        for name, measured in times.items():
            row = kernels._row(case, Variant(name, case.problem, lambda: None, name in ("cuda", "triton")), 1000)
            kernels._fill(row, case, measured, times, ceilings)
            if row.ours:
                kernels._judge(row, case)
            rows.append(row)
    latency = [records.Latency(suite.LATENCY_CASE.name, n, "auto", 10.0 + n, 9.0, 12.5 + n) for n in (1, 64)]
    facts = {"device": "Test GPU, one", "torch": "2.11", "date": "2026-01-01", "commit": "abc: def"}
    return records.Run(facts, kernels.as_ceilings(ceilings), rows, latency)


def test_all_cases_run_on_a_processor_and_write_their_files(tmp_path):
    done = run(*QUICK, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    header, rows = records.read_table(tmp_path / "cpu_kernels.csv")
    assert [row["case"] for row in rows[::2]] == [case.name for case in suite.CASES]
    assert {row["variant"] for row in rows} == {"eager", "cpu"}
    assert {row["status"] for row in rows} == {"measured"}
    assert {"device", "torch", "commit", "date", "ceiling copy GB/s", "ceiling bf16 TFLOP/s"} <= header.keys()
    for row in rows:
        nanoseconds, floor = float(row["ns_per_row"]), float(row["floor_ns"])
        assert float(row["over_floor"]) == pytest.approx(nanoseconds / floor, rel=1e-3)
        assert float(row["gb_per_s"]) == pytest.approx(int(row["bytes_per_row"]) / nanoseconds, rel=1e-3)
        assert row["goal_ns"] == "" and row["met"] == "", "goals are those of the GPU"
        assert row["case"] in done.output
    latencies = records.read_table(tmp_path / "cpu_latency.csv")[1]
    assert {(row["rows"], row["variant"]) for row in latencies} >= {("1", "cpu"), ("1024", "eager")}
    assert len(json.loads((tmp_path / "cpu_bench.json").read_text())["kernels"]) == len(rows)
    assert "aniso: encode-d1280-r128-bf16:" in done.stderr and " s\n" in done.stderr


def test_json_is_one_object_with_what_the_table_has():
    done = run(*QUICK, *ONE, "--json", "--commit", "abc1234")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["run"]["facts"]["commit"] == "abc1234"
    assert [row["variant"] for row in found["run"]["kernels"]] == ["eager", "cpu"]
    assert found["run"]["kernels"][1]["speedup_eager"] > 0


def test_cases_are_listed_with_their_goals():
    done = run("bench", "kernels", "--list")
    assert done.exit_code == 0
    assert "≤ 1.33 × floor, ≥ 2 × torch.compile" in done.output
    assert all(case.name in done.output for case in suite.CASES)


def broken(how):
    """The CPU backend with another `correct`."""
    return replace(backends.CPU, correct=lambda y, frame: how(backends.CPU.correct(y, frame)))


@pytest.mark.parametrize(
    "how, reason",
    [
        (lambda z: z.roll(1, 0), "allowed 2e-05"),
        (lambda z: torch.full_like(z, float("nan")), "not finite"),
        (lambda z: z.new_zeros(3)[5], "IndexError"),
    ],
    ids=["wrong rows", "nan", "raises"],
)
def test_a_wrong_backend_is_reported_and_not_timed(how, reason, monkeypatch, tmp_path):
    monkeypatch.setitem(backends._IMPLEMENTED, "cpu", broken(how))
    done = run(*QUICK, *ONE, "--out", tmp_path)
    assert done.exit_code == 1
    assert "aniso: error: wrong or failed, and not timed: correct-d512-r128-bf16, cpu: " in done.stderr
    assert reason in done.stderr
    eager, ours = records.read_table(tmp_path / "cpu_kernels.csv")[1]
    assert (ours["status"], ours["ns_per_row"]) == ("failed", "") and reason in ours["reason"]
    assert eager["status"] == "measured" and eager["ns_per_row"]


def test_unknown_names_are_named():
    done = run(*QUICK, "--case", "correct-d512")
    assert done.exit_code == 2 and "there is no case 'correct-d512'" in done.stderr
    done = run("bench", "kernels", "--backend", "fast")
    assert done.exit_code == 1 and "unknown backend 'fast'" in done.stderr


def test_a_missing_backend_is_an_error_with_its_reason(monkeypatch):
    reasons = {**backends.available(), "cuda": "no driver here"}
    monkeypatch.setattr(backends, "available", lambda: reasons)
    done = run("bench", "kernels", "--backend", "cuda")
    assert done.exit_code == 1
    assert "aniso: error: backend 'cuda' is not available: no driver here" in done.stderr


def test_ceilings_alone():
    done = run("bench", "ceilings", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert set(found["ceilings"]) == {"copy GB/s", "bf16 TFLOP/s", "fp32 TFLOP/s", "tf32 TFLOP/s"}
    assert min(found["ceilings"].values()) > 0
    assert run("bench", "ceilings", "--device", "tpu").exit_code == 2


def test_files_hold_what_was_measured(tmp_path):
    written = synthetic()
    paths = records.write(written, tmp_path, "h200")
    assert [path.name for path in paths] == ["h200_kernels.csv", "h200_latency.csv", "h200_bench.json"]
    header, rows = records.read_table(paths[0])
    assert header == written.header and header["commit"] == "abc: def"
    for row, kept in zip(rows, written.kernels, strict=True):
        for name, value in asdict(kept).items():
            if isinstance(value, bool):
                assert row[name] == ("yes" if value else "no")
            elif isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, rel=1e-4)
            else:
                assert row[name] == ("" if value is None else str(value))
    assert json.loads(paths[2].read_text()) == json.loads(json.dumps(asdict(written)))


def test_two_runs_are_compared(tmp_path):
    for name, scale in (("a", 1.0), ("b", 0.5)):
        records.write(synthetic(scale), tmp_path, name)
    (tmp_path / "c.csv").write_text((tmp_path / "b_kernels.csv").read_text().replace(",triton,", ",other,"))
    done = run("bench", "compare", tmp_path / "a_kernels.csv", tmp_path / "b_kernels.csv", "--json")
    assert done.exit_code == 0
    ratios = {(row["case"], row["variant"]): row["ratio"] for row in json.loads(done.stdout)["ratios"]}
    assert len(ratios) == 4 * len(suite.CASES)
    assert ratios["correct-d512-r128-bf16", "cuda"] == pytest.approx(0.5, rel=1e-3)
    assert ratios["correct-d512-r128-bf16", "eager"] == 1
    done = run("bench", "compare", tmp_path / "a_kernels.csv", tmp_path / "c.csv")
    assert done.exit_code == 0 and "in one of them alone: correct" in done.output and "Test GPU, one" in done.output


def test_files_that_are_no_tables_are_named(tmp_path):
    records.write(synthetic(), tmp_path, "a")
    (tmp_path / "empty.csv").write_text("# device: none\n")
    with pytest.raises(DataError, match=r"empty\.csv has no table"):
        records.compare(tmp_path / "empty.csv", tmp_path / "a_kernels.csv")
    with pytest.raises(DataError, match=r"a_latency\.csv has no times of kernels"):
        records.compare(tmp_path / "a_kernels.csv", tmp_path / "a_latency.csv")
    assert run("bench", "compare", tmp_path / "a_kernels.csv", tmp_path / "nothing.csv").exit_code == 1


def render_readme():
    specification = importlib.util.spec_from_file_location("render", REPOSITORY / "benchmarks" / "render_readme.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_readme_table_shows_times_goals_and_losses(tmp_path):
    render = render_readme()
    assert render.gpu_tables(tmp_path / "none.csv", tmp_path / "none.csv") == render.NO_GPU_RESULTS
    result = synthetic()
    loser = next(row for row in result.kernels if (row.case, row.variant) == ("decode-d1280-r128-bf16", "triton"))
    loser.status, loser.ns_per_row = "failed", None
    records.write(result, tmp_path, "h200")
    text = render.gpu_tables(tmp_path / "h200_kernels.csv", tmp_path / "h200_latency.csv")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    # 5120 bytes at 4250 GB/s is 1.2047 ns
    assert lines["correct-d1280-r128-bf16"] == (
        "| correct-d1280-r128-bf16 | 1.20 | **1.45 (1.20 ×)** | 2.17 (1.80 ×) | 6.02 (4.2 ×) |  | 36.14 (25.0 ×) "
        "| ≤ 1.33 ×, ≥ 2 × torch.compile: met by one |"
    )
    assert "| failed |" in lines["decode-d1280-r128-bf16"]
    assert lines["auto"] == "| auto | 11.0 | 74.0 |"
    page = render.replaced("a <!-- bench:gpu -->\nold\n<!-- /bench:gpu --> b", "gpu", "new")
    assert page == "a <!-- bench:gpu -->\nnew\n<!-- /bench:gpu --> b"


def test_the_readme_shows_the_committed_measurements():
    render, readme = render_readme(), (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tables = {
        "gpu": render.gpu_tables(render.GPU_KERNELS, render.GPU_LATENCY),
        "convert": render.conversion_tables(render.CONVERSIONS),
        "faults": render.fault_table(render.FAULTS),
    }
    for name, expected in tables.items():
        assert render.replaced(readme, name, expected) == readme, "run python benchmarks/render_readme.py"


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plots`")
    records.write(synthetic(), tmp_path, "a")
    done = run("bench", "figure", tmp_path / "a_kernels.csv", "--out", tmp_path / "new" / "roofline.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert run("bench", "figure", tmp_path / "a_latency.csv", "--out", tmp_path / "b.png").exit_code == 1
