"""aniso convert: workers, plan and verification as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_convert_embeddings import contents
from typer.testing import CliRunner, Result

import aniso_ext as aniso
from aniso_ext.cli.main import app

runner = CliRunner()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options of a conversion of three shards into ``out``."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 8)) + 1
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.split(rows, [30, 50])):
        np.save(tmp_path / "in" / f"part_{number}.npy", part)
    aniso.make_aligner("realign").fit(rows, -rows).save_pretrained(tmp_path / "aligner")
    places = {"--aligner": "aligner", "--input": "in", "--output": "out"}
    return [text for option, name in places.items() for text in (option, str(tmp_path / name))]


def run(files: list[str], *options: str, code: int = 0) -> Result:
    result = runner.invoke(app, ["convert", *files, *options])
    assert result.exit_code == code, result.output
    return result


def test_workers_of_a_corpus_conversion(files: list[str], tmp_path: Path) -> None:
    run([*files[:-1], str(tmp_path / "whole")], "--calibration", "corpus")
    first = run(files, "--calibration", "corpus", "--worker", "0/2").stdout
    assert first == (
        "worker 0 of 2 (as told)\n"
        "this worker's sums for the corpus mean are done; those of 2 of 3 shards are not yet: "
        "run the same command again once all workers have ended\n"
    )
    second = run(files, "--calibration", "corpus", "--worker", "1/2").stdout
    assert "this worker's shards are done; 1 of 3 shards of the conversion are not yet" in second
    assert "60 rows by realign in 3 shard(s)" in run(files, "--calibration", "corpus", "--worker", "0/2").stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_environment_decides_the_worker(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    shown = run(files).stdout
    assert shown.startswith("worker 1 of 3 (SLURM_ARRAY_TASK_ID of SLURM_ARRAY_TASK_COUNT)\n")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == ["part_1.npy"]
    assert json.loads(run(files, "--worker", "0/1", "--json").stdout)["missing_shards"] == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(files: list[str], tmp_path: Path) -> None:
    shown = run(files, "--dry-run", "--worker", "1/2", "--dtype", "float16").stdout
    assert "60 rows in 3 shard(s): 1.92 kB in, 960 B out as float16, 8192 rows at a time\n" in shown
    assert "2 workers with 30 to 30 rows each; this one has 2 shard(s) of 30 rows\n" in shown
    assert shown.endswith("nothing was written\n")
    assert not (tmp_path / "out").exists()
    run(files, "--worker", "0/2")
    assert "1 of 3 shards are done\n" in run(files, "--dry-run").stdout
    assert json.loads(run(files, "--dry-run", "--json").stdout)["rows_left"] == 30


def test_verification_ends_with_exit_code_1_at_the_first_difference(files: list[str], tmp_path: Path) -> None:
    run(files)
    assert "60 stand-ins made again: the same to the bit" in run(files, "--verify", "all").stdout
    assert json.loads(run(files, "--verify", "sample", "--json").stdout)["checked_rows"] == 60
    content = bytearray((tmp_path / "out" / "part_2.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / "part_2.npy").write_bytes(content)
    error = run(files, "--verify", "sample", code=1).stderr
    assert error.startswith(f"aniso: error: {tmp_path / 'out' / 'part_2.npy'}: has xxh3_128 ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--worker", "4/4"),
        ("--worker", "x"),
        ("--memory", "much"),
        ("--verify", "all", "--dry-run"),
        ("--threads", "0"),
    ],
)
def test_bad_usage_is_exit_code_2(files: list[str], tmp_path: Path, options: tuple[str, ...]) -> None:
    assert options[0] in run(files, *options, code=2).output
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_an_error(files: list[str], tmp_path: Path) -> None:
    assert "is too little for batches of 64 rows" in run(files, "--memory", "1KB", code=1).stderr
    assert not (tmp_path / "out").exists()
    run(files, "--memory", "50MB")
