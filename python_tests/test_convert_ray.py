"""Conversion by tasks of Ray: the bytes of one process, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aniso_ext.align import make_aligner
from aniso_ext.cli.main import app
from aniso_ext.convert import convert_embeddings, convert_on_ray
from aniso_ext.errors import BackendUnavailableError, DataError, InputError, StoppedError

WIDTH, SHARDS = 8, 5


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(ancestor: int) -> set[int]:
    """Processes that a process has started, directly or not."""
    parents = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(process)] = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    found, more = {ancestor}, {ancestor}
    while more:
        more = {process for process, parent in parents.items() if parent in more} - found
        found |= more
    return found - {ancestor}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligner, an input of five shards, and what one process makes of it with both calibrations."""
    folder = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, WIDTH)).astype(np.float32) + 1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    aligner = make_aligner("anisoalign", rank=4, knots=32, refine=False, calibration_steps=1)
    aligner.fit(rows, -rows).save_pretrained(folder / "aligner")
    (folder / "input").mkdir()
    for number, part in enumerate(np.split(rows, [100, 900, 901, 2000])):
        np.save(folder / "input" / f"{number}.npy", part)
    for calibration in ("fitted", "corpus"):
        convert_embeddings(aligner, folder / "input", folder / calibration, calibration=calibration, batch_rows=128)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two places on this machine for all tests that do not start a cluster of their own."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_the_bytes_are_those_of_one_process(cluster: None, files: Path, tmp_path: Path, calibration: str) -> None:
    seen: list[tuple[int, int]] = []
    report = convert_on_ray(
        files / "aligner",
        files / "input",
        tmp_path / "out",
        calibration=calibration,
        batch_rows=128,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(tmp_path / "out") == contents(files / calibration)
    assert (report.rows, report.shards, report.resumed_shards, report.missing_shards) == (3000, SHARDS, 0, 0)
    passes = {"fitted": 1, "corpus": 3}[calibration]  # two means, for the fixed-point step, then the conversion
    assert seen[-1] == (3000 * passes, 3000 * passes) and seen == sorted(seen)


def test_what_is_finished_is_taken_over(cluster: None, files: Path, tmp_path: Path) -> None:
    aligner, output = files / "aligner", tmp_path / "out"
    convert_on_ray(aligner, files / "input", output, batch_rows=128)
    (output / "3.npy").unlink()
    report = convert_on_ray(aligner, files / "input", output, batch_rows=128)
    assert report.resumed_shards == 3
    assert contents(output) == contents(files / "fitted")
    with pytest.raises(DataError, match="exists already"):
        convert_on_ray(aligner, files / "input", output, batch_rows=128, on_existing="fail")
    convert_on_ray(aligner, files / "input", output, batch_rows=128, on_existing="overwrite")
    assert contents(output) == contents(files / "fitted")


def test_a_bad_row_is_the_error_of_one_process(cluster: None, files: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        rows = np.eye(WIDTH, dtype=np.float32)
        rows[5] *= number != 1
        np.save(tmp_path / "in" / f"{number}.npy", rows)
    with pytest.raises(DataError, match=r"1\.npy: row 5 is zero"):
        convert_on_ray(files / "aligner", tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.tmp"))
    with pytest.raises(InputError, match="on_bad must be one of"):
        convert_on_ray(files / "aligner", tmp_path / "in", tmp_path / "out", on_bad="maybe")


def test_a_run_stops_when_told_and_resumes(cluster: None, files: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="run the same command again"):
        convert_on_ray(files / "aligner", files / "input", tmp_path / "out", batch_rows=1, stop=lambda: True)
    convert_on_ray(files / "aligner", files / "input", tmp_path / "out", batch_rows=1)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == sorted(contents(files / "fitted"))


def test_a_task_whose_process_is_killed_is_done_by_another(cluster: None, files: Path, tmp_path: Path) -> None:
    finished = threading.Event()
    killed: list[int] = []

    def kill_the_first() -> None:
        while not finished.is_set() and not killed:
            for process in descendants(os.getpid()):
                if command_of(process).startswith(b"ray::_convert_share"):
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    break

    hunter = threading.Thread(target=kill_the_first)
    hunter.start()
    try:
        convert_on_ray(files / "aligner", files / "input", tmp_path / "out", batch_rows=128)
    finally:
        finished.set()
        hunter.join()
    assert killed
    assert contents(tmp_path / "out") == contents(files / "fitted")


def test_a_task_that_fits_nowhere_is_refused(cluster: None, files: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="a task needs 3 CPUs, Ray has 2 CPUs"):
        convert_on_ray(files / "aligner", files / "input", tmp_path / "out", cpus=3)


def test_without_ray_the_extra_is_named(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'aniso_ext\[ray\]'"):
        convert_on_ray(files / "aligner", files / "input", tmp_path / "out")


def test_the_command_hands_the_work_to_ray(
    cluster: None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", "--aligner", files / "aligner", "--input", files / "input", "--output", tmp_path / "out"]
    words += ["--batch-rows", 128, "--engine", "ray", "--json"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and json.loads(done.stdout)["shards"] == SHARDS
    assert contents(tmp_path / "out") == contents(files / "fitted")
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--worker", "0/2")])
    assert done.exit_code == 2 and "Ray hands out the work by itself" in done.output


def test_the_address_of_the_environment_is_taken(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    asked: list[str] = []

    def init(address: str, **options: object) -> None:
        asked.append(address)
        raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    reasons = {"10.0.0.1:6379": "be reached at RAY_ADDRESS '10.0.0.1:6379'", "": "start on this machine"}
    for address, reason in reasons.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(BackendUnavailableError, match=f"Ray cannot {reason}: nobody there"):
            convert_on_ray(files / "aligner", files / "input", tmp_path / "out")
    assert asked == ["10.0.0.1:6379", "local"]
