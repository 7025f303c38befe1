"""A fit by tasks of Ray: to the bit that of as many processes of torch.distributed."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from test_align_processes import SOURCE, TARGET, aligner_for, refined_aligner, write_shards
from typer.testing import CliRunner

from aniso_ext.align import Aligner, load_aligner
from aniso_ext.align.ray_fit import fit_on_ray
from aniso_ext.cli.main import app
from aniso_ext.errors import BackendUnavailableError, InputError, StoppedError

PROCESSES = 2


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    for name in ("closed", "refined"):
        fitted = made(name).fit(f"{folder}/source", f"{folder}/target.npy")
        if rank == 0:
            fitted.save_pretrained(f"{folder}/{name}")
    torch.distributed.destroy_process_group()


def made(name: str) -> Aligner:
    return refined_aligner() if name == "refined" else aligner_for("anisoalign")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings in files, and what two processes without Ray make of them."""
    folder = tmp_path_factory.mktemp("ray_fit")
    write_shards(folder / "source")
    np.save(folder / "target.npy", TARGET)
    mp.spawn(_worker, args=(str(folder),), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # the tasks unpickle functions of this file's package by name
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local", num_cpus=PROCESSES, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.parametrize("name", ["closed", "refined"])
def test_tasks_fit_what_processes_fit(cluster: None, folder: Path, name: str) -> None:
    fitted = fit_on_ray(made(name), folder / "source", folder / "target.npy")
    alone = load_aligner(folder / name)
    assert fitted.fingerprint() == alone.fingerprint()
    assert fitted.corpora_ == alone.corpora_
    numbers = {key: value for key, value in alone.summary_.items() if not key.endswith("seconds")}
    assert {key: fitted.summary_[key] for key in numbers} == numbers


def test_tasks_fit_what_one_process_fits_to_rounding(cluster: None, folder: Path) -> None:
    fitted = fit_on_ray(made("closed"), folder / "source", folder / "target.npy", tasks=2)._arrays()
    for name, value in made("closed").fit(SOURCE, TARGET)._arrays().items():
        # as in test_align_processes: sums of 1e4 float64 numbers of unit size, then eigenvectors and roots
        assert float((fitted[name] - value).abs().max()) <= 1e4 * np.finfo(np.float64).eps, name


def test_the_error_of_a_task_is_that_of_one_process(cluster: None, folder: Path, tmp_path: Path) -> None:
    broken = TARGET.copy()
    broken[-1] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(InputError, match=r"target has 1 non-finite rows .* the first is row 8499"):
        fit_on_ray(aligner_for("realign"), folder / "source", tmp_path / "broken.npy")
    with pytest.raises(BackendUnavailableError, match="3 tasks must run at the same time, and Ray has room for 2"):
        fit_on_ray(made("closed"), folder / "source", folder / "target.npy", tasks=3)
    with pytest.raises(InputError, match="tasks must be an integer of at least 1, got 0"):
        fit_on_ray(made("closed"), folder / "source", folder / "target.npy", tasks=0)


def test_a_fit_stops_when_told(cluster: None, folder: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return True

    with pytest.raises(StoppedError):
        fit_on_ray(made("refined"), folder / "source", folder / "target.npy", stop=stop)
    assert asked


def test_the_command_hands_the_fit_to_ray(cluster: None, folder: Path, tmp_path: Path) -> None:
    words: list[Any] = ["fit", "--source", folder / "source", "--target", folder / "target.npy", "--no-refine"]
    words += ["--json", "--rank", 6, "--out"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / "one", "--engine", "ray", "--tasks", 1)])
    assert done.exit_code == 0, done.output
    local = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / "local")])
    # one task is one process, to the bit
    assert json.loads(done.stdout)["fingerprint"] == json.loads(local.stdout)["fingerprint"]
    assert load_aligner(tmp_path / "one").fingerprint() == json.loads(done.stdout)["fingerprint"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / "two", "--tasks", 2)])
    assert done.exit_code == 2 and "only --engine ray has tasks" in done.output


def test_without_ray_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'aniso_ext\[ray\]'"):
        fit_on_ray(made("closed"), folder / "source", folder / "target.npy")


def test_ray_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    np.save(tmp_path / "rows.npy", np.eye(8, dtype=np.float32))
    words = ["fit", "--source", tmp_path / "rows.npy", "--target", tmp_path / "rows.npy", "--out", tmp_path / "out"]
    found = CliRunner().invoke(app, [*map(str, words), "--method", "mean_shift", "--engine", "ray"])
    assert found.exit_code == 2 and "run it without torchrun" in " ".join(found.output.split())
    assert not (tmp_path / "out").exists()
