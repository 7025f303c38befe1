"""The benchmark of text-only training runs at its small size, and its counts fit each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aniso_ext.bench.records import read_table

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_small_benchmark_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "mllm_speed.py"), "--small", "--device", "cpu"]
    done = subprocess.run(
        [*program, "--out", str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    header, rows = read_table(out)
    assert header["model"] == "tiny"
    by_name = {
        (row.pop("part"), row.pop("variant")): {key: float(value or "nan") for key, value in row.items()}
        for row in rows
    }
    step, ours = by_name["full", "step"], by_name["full", "ours"]
    assert ours["share"] == pytest.approx(ours["seconds"] / step["seconds"], rel=1e-3)  # cells have five digits
    # tiny: 2 layers of 4 * 64^2 + 3 * 64 * 176, their norms, the last norm and the head
    weights = 2 * (4 * 64**2 + 3 * 64 * 176 + 2 * 64) + 64 + 512 * 64
    least = 6 * weights * step["tokens"] / step["seconds"] / 1e12
    most = least + 12 * 64 * 2 * step["tokens"] * 128 / step["seconds"] / 1e12
    assert least < step["tflop_per_s"] < most
    assert 128 < step["tokens"] <= 2 * 128
    assert by_name["projector", "1 visual tokens"]["seconds"] < by_name["projector", "576 visual tokens"]["seconds"]
