"""A conversion that dies at any step that changes the disk ends, once resumed, in the bytes of an unbroken one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from convert_deaths import CASES, SummingAffine
from test_convert_embeddings import make_input

from aniso_ext.convert import convert_embeddings

HERE = Path(__file__).parent


@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_death_at_any_durable_step_ends_in_the_same_bytes(tmp_path: Path, calibration: str) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(
        SummingAffine(), tmp_path / "in", tmp_path / "whole", batch_rows=4, calibration=calibration
    )
    (tmp_path / "runs").mkdir()
    folders = [str(tmp_path / name) for name in ("in", "whole", "runs")]
    done = subprocess.run(
        [sys.executable, str(HERE / "convert_deaths.py"), calibration, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
    )
    assert done.returncode == 0, done.stderr
    steps = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(steps) == len(CASES[calibration])
    assert min(steps) >= 6, done.stdout  # of one shard alone: a rename, the place of its line, and their flushes
