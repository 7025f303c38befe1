"""Two processes by torchrun: copies of the weights (DDP) and shards of them (FSDP2) do what one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mllm_worlds import World, weights
from test_mllm_correction import refined

import aniso_ext as aniso

pytestmark = pytest.mark.slow
WORLD = World()
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    np.save(folder / "text.npy", WORLD.embeddings)
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, WORLD.captions)))
    refined().save_pretrained(folder / "aligner")
    run(folder, "one")
    return folder


def run(folder: Path, name: str, *more: str, processes: int = 1) -> dict[str, Any]:
    """What ``aniso train --json`` prints, from one process or from several."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    captions = str(folder / "captions.jsonl")
    program = [
        *launcher, "aniso_ext.cli", "train", "--model", "llama:tiny", "--source-embeddings", str(folder / "text.npy"),
        "--conversations", captions, "--index", captions, "--aligner", str(folder / "aligner"), "--train-refiner",
        "--output", str(folder / name), "--global-batch", "16", "--device-batch", "4", "--vocab-size", "300",
        "--device", "cpu", "--learning-rate", "1e-3", "--save-every", "2", "--json", *more,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    # about 20 s; processes that wait for each other in vain would wait for half an hour
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def losses(folder: Path, name: str) -> list[float]:
    found = []
    for stage in ("projector", "full"):
        lines = (folder / name / "log" / f"{stage}.jsonl").read_text().splitlines()
        found += [json.loads(line)["loss"] for line in lines]
    return found


@pytest.fixture(scope="module", params=["", "--fsdp"], ids=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, folder: Path) -> str:
    """Name of the run of two processes."""
    name = f"two{request.param}"
    data = run(folder, name, *request.param.split(), processes=2)
    assert [stage["rows_per_step"] for stage in data["stages"]] == [16, 16]
    return name


def test_two_processes_train_what_one_trains(folder: Path, two: str) -> None:
    # the same rows in the same steps: sums in another order, to float32, through six steps of AdamW whose sign-like
    # first steps move a weight by no more than the rate
    ours, theirs = losses(folder, two), losses(folder, "one")
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-5)
    saved, alone = weights(folder / two), weights(folder / "one")
    assert set(saved) == set(alone)
    shares = [float((saved[key] - alone[key]).norm() / alone[key].norm().clamp_min(1e-3)) for key in alone]
    assert max(shares) < 1e-3
    tuned = [aniso.load_aligner(folder / run / "aligner").refiner_.last.weight for run in (two, "one")]
    torch.testing.assert_close(*tuned, rtol=0, atol=1e-4)
    states = {path.name for path in (folder / two / "full" / "checkpoint-3").iterdir()}
    assert ("pytorch_model_fsdp.bin" in states) == ("fsdp" in two)  # sharded for real, not copied


def test_a_run_of_two_processes_resumes(folder: Path, two: str) -> None:
    parts = shutil.copytree(folder / two, folder / f"{two}-parts")
    shutil.rmtree(parts / "full")  # as if it had been stopped after the first stage
    run(folder, parts.name, *two.removeprefix("two").split(), "--resume", processes=2)
    assert losses(folder, parts.name) == losses(folder, two)
