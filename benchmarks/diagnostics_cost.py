"""Seconds and memory of the diagnostics for simulated pairs; writes benchmarks/results/<device>_diagnostics_cost.csv.

    python benchmarks/diagnostics_cost.py --device cpu --threads 2
    python benchmarks/diagnostics_cost.py --device cuda

Without --pairs: 10 000 pairs of width 1280, and with CUDA also 1 000 000, all of them in every neighbour search. Rows
are made on the device, float32: a shared part with a decaying spectrum, a residual of its own for either side, and the
mean shift as the transform. Each time is the first call after one on few rows, that is, without loading of libraries.
``neighbours`` is omega, mixing and recall alone; with CUDA, products is the time of its float16 products alone.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import torch

from aniso_ext import diagnostics
from aniso_ext.diagnostics.candidates import RoundedRows
from aniso_ext.diagnostics.searches import by_halves, nearest, search_union

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 2**16


@dataclass(frozen=True)
class Cost:
    """One row of the table: seconds, and peaks in GB of the whole process (host) and of the step that needs most."""

    pairs: int
    width: int
    k: int
    threads: int
    gap: float
    gap_intervals: float
    neighbours: float
    products: float
    alignment: float
    alignment_intervals: float
    host_peak_gb: float
    device_peak_gb: float


def make_rows(pairs: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, x and z, float32 unit rows [pairs, width] on the device."""
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.arange(1, width + 1, device=device, dtype=torch.float32) ** -0.5
    scale = scale / scale.norm()
    offset = torch.randn(width, generator=generator, device=device) / width**0.5
    sides = tuple(torch.empty(pairs, width, device=device) for _ in range(3))
    for start in range(0, pairs, BATCH):
        part = slice(start, min(start + BATCH, pairs))
        noise = torch.randn(3, part.stop - start, width, generator=generator, device=device) * scale
        sides[0][part] = torch.nn.functional.normalize(noise[0] + 0.5 * noise[1] + 0.3 * offset)
        sides[1][part] = torch.nn.functional.normalize(noise[0] + 0.5 * noise[2] - 0.3 * offset)
    shift = sides[1].mean(dim=0) - sides[0].mean(dim=0)
    for start in range(0, pairs, BATCH):
        sides[2][start : start + BATCH] = torch.nn.functional.normalize(sides[0][start : start + BATCH] + shift)
    return sides


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def all_neighbours(sides: tuple[torch.Tensor, ...], k: int, half: bool) -> None:
    y, x, z = sides
    nearest(y, k, half=half)
    match = torch.cat(
        [(a.double() * b.double()).sum(dim=1) for a, b in zip(x.split(BATCH), z.split(BATCH), strict=True)]
    )
    search_union(x, z, k, match, half=half)


def product_seconds(rows: torch.Tensor, device: torch.device) -> float:
    """The float16 products of all searches: y with y, and x and z with both; 5 N^2 scores."""
    half = RoundedRows(rows).rounded
    size = max(128, 2**31 // half.shape[0] // 128 * 128)
    block = half[:size]
    scores = block @ half.T

    def one() -> None:
        for _ in range(4):
            torch.mm(block, half.T, out=scores)

    return seconds(one, device) / 4 / block.shape[0] * rows.shape[0] * 5


def measure(pairs: int, width: int, k: int, threads: int, device: torch.device) -> Cost:
    """The steps one after another on the same rows."""
    sides = make_rows(pairs, width, device)
    half = by_halves(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    options = {"k": k, "max_pairs": None, "device": device}
    found = {
        "gap": seconds(lambda: diagnostics.gap(*sides[:2], device=device), device),
        "gap_intervals": seconds(lambda: diagnostics.gap(*sides[:2], bootstrap=200, device=device), device),
        "neighbours": seconds(
            lambda: all_neighbours(sides if half else tuple(side.double() for side in sides), k, half), device
        ),
        "alignment": seconds(lambda: diagnostics.alignment(*sides, **options), device),
        "alignment_intervals": seconds(lambda: diagnostics.alignment(*sides, bootstrap=200, **options), device),
    }
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    products = product_seconds(sides[0], device) if half else 0.0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return Cost(pairs, width, k, threads, products=products, host_peak_gb=host, device_peak_gb=peak, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, nargs="+", help="default: 10000, and with CUDA also 1000000")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", diagnostics.DiagnosticsWarning)
    device = torch.device(options.device)
    sizes = options.pairs or ([10_000, 1_000_000] if device.type == "cuda" else [10_000])
    measure(max(500, 2 * options.k), options.width, options.k, options.threads, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    command = f"python benchmarks/diagnostics_cost.py --device {options.device} --pairs {' '.join(map(str, sizes))}"
    command += f" --width {options.width} --k {options.k} --threads {options.threads}"
    lines = [f"# {date.today()}, {name}, torch {torch.__version__}; {command}"]
    lines.append(",".join(field.name for field in fields(Cost)))
    for pairs in sizes:
        cost = measure(pairs, options.width, options.k, options.threads, device)
        values = (getattr(cost, field.name) for field in fields(Cost))
        lines.append(",".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
        print("\n".join(lines), flush=True)
    (RESULTS / f"{options.device}_diagnostics_cost.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
