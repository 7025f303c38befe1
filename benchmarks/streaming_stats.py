"""Statistics of embeddings streamed from disk: peak memory at growing row counts, and the error against two passes.

    python benchmarks/streaming_stats.py [--rows 1000000] [--width 512] [--blocks 64]

writes a temporary float16 .npy, streams its first 10 %, 25 % and 100 % of rows through ``open_embeddings``, ``Moments``
and ``RadiusSketch``, each in a fresh process, and compares mean and covariance with a two-pass computation: the mean in
extended precision, the products in float64 about it. Results go to results/streaming_stats.csv; the exit code is 1 if
the error exceeds 1e-10 or the peak grows by more than 10 MB from the smallest count to the largest.

Peak memory is the resident set of the whole process as the kernel reports it (VmHWM). Batches are read with plain file
reads into fresh arrays, so the file's pages stay in the page cache and are no part of it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "streaming_stats.csv"
GOAL_ERROR = 1e-10
GOAL_GROWTH_MB = 10.0
BATCH_ROWS = 8192
COLUMNS = (
    "rows",
    "file_mb",
    "baseline_mb",
    "peak_mb",
    "seconds",
    "rows_per_second",
    "mean_error",
    "covariance_error",
    "radius_error",
    "radius_bound",
)


def write_rows(path: Path, rows: int, width: int, seed: int) -> None:
    """Unit rows in float16 with a common mean and a decaying spectrum: neither centred nor white."""
    from aniso_ext.data import EmbeddingWriter

    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(width).astype(np.float32) / width**0.5
    scale = (np.arange(1, width + 1, dtype=np.float32) ** -0.5)[rng.permutation(width)]
    with EmbeddingWriter(path, dtype="float16", width=width) as writer:
        for start in range(0, rows, BATCH_ROWS):
            batch = rng.standard_normal((min(BATCH_ROWS, rows - start), width), dtype=np.float32)
            batch = mean + batch * (0.3 * scale)
            writer.write(batch / np.linalg.norm(batch, axis=1, keepdims=True))


def radii_of(batch: np.ndarray, blocks: int) -> np.ndarray:
    """Radii [n, M] of consecutive coordinate pairs of the first 2 M columns."""
    pairs = batch[:, : 2 * blocks].astype(np.float32)
    return np.sqrt(pairs[:, 0::2] ** 2 + pairs[:, 1::2] ** 2)


def memory_mb(field: str) -> float:
    """A field of /proc/self/status in MB (VmHWM: peak resident set, VmRSS: the present one)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def child(path: Path, rows: int, blocks: int, out: Path) -> None:
    """Stream the first ``rows`` rows and save what came out."""
    from aniso_ext.data import open_embeddings
    from aniso_ext.stats import Moments, RadiusSketch

    embeddings = open_embeddings(path)
    shard = embeddings.shards[0]
    moments, sketch = Moments(embeddings.width), RadiusSketch(blocks)
    baseline = memory_mb("VmRSS")
    started = time.perf_counter()
    for batch in shard.batches(0, rows, BATCH_ROWS):
        moments.update(batch)
        sketch.update(radii_of(batch, blocks))
    seconds = time.perf_counter() - started
    peak = memory_mb("VmHWM")
    np.savez(out, mean=moments.mean, covariance=moments.covariance, knots=sketch.knots())
    print(json.dumps({"baseline": baseline, "peak": peak, "seconds": seconds, "bound": sketch.relative_error}))


def two_pass(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean summed in extended precision, covariance as float64 products about it; another reader, other batches."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)[:rows]
    step = 5000
    total = np.zeros(stored.shape[1], np.longdouble)
    for start in range(0, rows, step):
        total += stored[start : start + step].sum(axis=0, dtype=np.longdouble)
    mean = total / rows
    scatter = np.zeros((stored.shape[1],) * 2)
    for start in range(0, rows, step):
        centred = (stored[start : start + step] - mean).astype(np.float64)
        scatter += centred.T @ centred
    return mean, scatter / rows


def exact_radius_error(path: Path, rows: int, blocks: int, knots: np.ndarray) -> float:
    """Largest relative error of the knots of four blocks against exact quantiles of all radii."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    levels = np.sin(0.5 * np.pi * np.arange(knots.shape[1]) / (knots.shape[1] - 1)) ** 2
    worst = 0.0
    for block in np.linspace(0, blocks - 1, min(4, blocks)).astype(int):
        radii = radii_of(np.array(stored[:rows, 2 * block : 2 * block + 2]), 1)[:, 0]
        want = np.quantile(radii.astype(np.float64), levels)
        worst = max(worst, float(np.abs(knots[block] / want - 1).max()))
    return worst


def measure(path: Path, rows: int, width: int, blocks: int, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    out = folder / f"{rows}.npz"
    command = [sys.executable, __file__, "--child", str(path), "--rows", str(rows), "--blocks", str(blocks)]
    done = subprocess.run(
        [*command, "--out", str(out)], check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment()
    )
    found = json.loads(done.stdout)
    with np.load(out, allow_pickle=False) as saved:
        mean, covariance, knots = saved["mean"], saved["covariance"], saved["knots"]
    want_mean, want_covariance = two_pass(path, rows)
    return {
        "rows": rows,
        "file_mb": round(rows * width * 2 / 2**20, 1),
        "baseline_mb": round(found["baseline"], 1),
        "peak_mb": round(found["peak"], 1),
        "seconds": round(found["seconds"], 1),
        "rows_per_second": round(rows / found["seconds"]),
        "mean_error": f"{float(np.abs(mean - want_mean).max()):.2e}",
        "covariance_error": f"{float(np.abs(covariance - want_covariance).max()):.2e}",
        "radius_error": f"{exact_radius_error(path, rows, blocks, knots):.2e}",
        "radius_bound": f"{found['bound']:.2e}",
    }


def environment() -> dict[str, str]:
    """The child imports this source tree, whether the package is installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}


def header(arguments: argparse.Namespace, load: float) -> str:
    """Where and how the numbers were made; a load well above 1 at the start says that the times are too long."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    command = f"python benchmarks/streaming_stats.py --rows {arguments.rows} --width {arguments.width}"
    return (
        f"# {cpu}, {os.cpu_count()} cores, load {load:.1f} before the run, OMP_NUM_THREADS {threads}; "
        f"{datetime.date.today()}; Python {platform.python_version()}, numpy {np.__version__}; "
        f"{command} --blocks {arguments.blocks}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="largest row count")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--blocks", type=int, default=64, help="M, blocks whose radii are sketched")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to put the temporary file (rows x width x 2 bytes)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.rows, arguments.blocks, arguments.out)
        return 0
    if 2 * arguments.blocks > arguments.width or arguments.rows < 10:
        parser.error("needs at least 10 rows and a width of at least 2 x blocks")
    sys.path.insert(0, str(REPOSITORY))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "rows.npy"
        write_rows(path, arguments.rows, arguments.width, arguments.seed)
        counts = (arguments.rows // 10, arguments.rows // 4, arguments.rows)
        lines = [measure(path, rows, arguments.width, arguments.blocks, Path(folder)) for rows in counts]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        file.write(header(arguments, load) + "\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(arguments.out.read_text(), end="")
    growth = lines[-1]["peak_mb"] - lines[0]["peak_mb"]
    error = max(float(line[name]) for line in lines for name in ("mean_error", "covariance_error"))
    print(f"peak grows by {growth:.1f} MB from {counts[0]:,} to {counts[-1]:,} rows; largest error {error:.1e}")
    return 0 if error <= GOAL_ERROR and growth <= GOAL_GROWTH_MB else 1


if __name__ == "__main__":
    sys.exit(main())
