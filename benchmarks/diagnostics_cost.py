"""Seconds and memory of the diagnostics for simulated pairs; writes benchmarks/results/<device>_diagnostics_cost.csv.

    python benchmarks/diagnostics_cost.py --device cpu --threads 2
    python benchmarks/diagnostics_cost.py --device cuda
    python benchmarks/diagnostics_cost.py --device cuda --pairs 10000000 --max-queries 100000

Without --pairs: 10 000 pairs of width 1280, and with CUDA also 1 000 000, all of them in every neighbour search. Rows
are made on the device, float32: a shared part with a decaying spectrum, a residual of its own for either side, and the
mean shift as the transform. Each time is the first call after one on few rows, that is, without loading of libraries.
``neighbours`` is omega, mixing and recall alone; with CUDA, products is the time of its float16 products alone.

With --max-queries, neighbours of that many pairs are searched among all, rows are float16 in host memory and pass by,
and results/<device>_diagnostics_cost_sampled.csv is written: seconds to make the rows, of the searches alone, and of
the whole alignment with intervals; the largest standard error that the sample leaves; and the recall of the lists of
``checked`` queries against float64 products with every row (a column within 1e-6 of the k-th counts as found). Host
memory is 6 D bytes a pair: 77 GB for 10M pairs of width 1280.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from aniso_ext import diagnostics
from aniso_ext.diagnostics.candidates import RoundedRows
from aniso_ext.diagnostics.neighbours import TIE, Nearest, unit_rows
from aniso_ext.diagnostics.rows import open_rows
from aniso_ext.diagnostics.sampled import choose_queries, sampled_neighbours
from aniso_ext.diagnostics.searches import by_halves, nearest, search_union
from aniso_ext.diagnostics.streams import Stream

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 2**16
CHECKED = 200


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


@dataclass(frozen=True)
class SampledCost:
    """One row of the table of sampled queries."""

    pairs: int
    queries: int
    width: int
    k: int
    threads: int
    making: float
    neighbours: float
    alignment_intervals: float
    largest_error: float
    checked: int
    recall: float
    host_peak_gb: float
    device_peak_gb: float


class World:
    """Batches of y and x on a device: a shared part with a decaying spectrum and a residual of its own for either."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)
        scale = torch.arange(1, width + 1, device=device, dtype=torch.float32) ** -0.5
        self._scale = scale / scale.norm()
        self._offset = torch.randn(width, generator=self._generator, device=device) / width**0.5

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (3, rows, self._scale.numel())
        noise = torch.randn(shape, generator=self._generator, device=self.device) * self._scale
        return (
            normalize(noise[0] + 0.5 * noise[1] + 0.3 * self._offset),
            normalize(noise[0] + 0.5 * noise[2] - 0.3 * self._offset),
        )


def make_rows(pairs: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, x and z, float32 unit rows [pairs, width] on the device."""
    world = World(width, device)
    sides = tuple(torch.empty(pairs, width, device=device) for _ in range(3))
    for start in range(0, pairs, BATCH):
        part = slice(start, min(start + BATCH, pairs))
        sides[0][part], sides[1][part] = world.batch(part.stop - start)
    shift = sides[1].mean(dim=0) - sides[0].mean(dim=0)
    for start in range(0, pairs, BATCH):
        sides[2][start : start + BATCH] = normalize(sides[0][start : start + BATCH] + shift)
    return sides


def make_host_rows(pairs: int, width: int, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in host memory, float16; the shift is that of the first batch."""
    world = World(width, device)
    sides = tuple(np.empty((pairs, width), np.float16) for _ in range(3))
    shift = None
    for start in range(0, pairs, BATCH):
        part = slice(start, min(start + BATCH, pairs))
        y, x = world.batch(part.stop - start)
        shift = x.mean(dim=0) - y.mean(dim=0) if shift is None else shift
        for side, rows in zip(sides, (y, x, normalize(y + shift)), strict=True):
            torch.from_numpy(side[part]).copy_(rows.half())
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


def sampled_searches(
    sides: tuple[np.ndarray, ...], queries: int, k: int, device: torch.device
) -> tuple[Nearest, float]:
    """Neighbours among sources, and the seconds of all searches."""
    y, x, z = (Stream(open_rows("rows", side), None, device) for side in sides)
    chosen = choose_queries(x.shape[0], queries, 0)
    match = (unit_rows(x.take(chosen).double()) * unit_rows(z.take(chosen).double())).sum(dim=1)
    found = []
    spent = seconds(lambda: found.append(sampled_neighbours(y, x, z, chosen, k, match, half=by_halves(device))), device)
    return found[0][0], spent


def listed_recall(side: np.ndarray, found: Nearest, queries: int, checked: int, device: torch.device) -> float:
    """Share of the listed neighbours of the first queries that are among the k best of all float64 cosines."""
    rows = Stream(open_rows("rows", side), None, device)
    chosen = choose_queries(rows.shape[0], queries, 0)[:checked]
    wanted = unit_rows(rows.take(chosen).double())
    best = torch.full((checked, found.k), -torch.inf, dtype=torch.float64, device=device)
    start = 0
    for tile in rows.split(2**15):
        scores = wanted @ unit_rows(tile.double()).T
        places = chosen.to(device) - start
        inside = ((places >= 0) & (places < tile.shape[0])).nonzero()[:, 0]
        scores[inside, places[inside]] = -torch.inf
        best = torch.cat((best, scores), dim=1).topk(found.k, dim=1).values
        start += tile.shape[0]
    listed = found.indices[:checked].long()
    near = unit_rows(rows.take(listed.flatten()).double()).view(checked, found.k, -1)
    cosines = (near * wanted.unsqueeze(1)).sum(dim=2)
    return float((cosines >= best[:, -1:] - TIE).double().mean())


def measure_sampled(pairs: int, queries: int, width: int, k: int, threads: int, device: torch.device) -> SampledCost:
    """Searches alone and the whole report, on the same rows in host memory."""
    started = time.perf_counter()
    sides = make_host_rows(pairs, width, device)
    making = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    queries = min(queries, pairs // 2)
    found, neighbours = sampled_searches(sides, queries, k, device)
    reports = []
    whole = seconds(
        lambda: reports.append(
            diagnostics.alignment(*sides, k=k, max_pairs=None, max_queries=queries, bootstrap=200, device=device)
        ),
        device,
    )
    print(reports[0], flush=True)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    checked = min(CHECKED, queries)
    recall = listed_recall(sides[0], found, queries, checked, device)
    error = max(reports[0].query_errors.values())
    return SampledCost(pairs, queries, width, k, threads, making, neighbours, whole, error, checked, recall, host, peak)


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
    parser.add_argument("--max-queries", type=int, help="pairs whose neighbours are searched; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", diagnostics.DiagnosticsWarning)
    device = torch.device(options.device)
    sizes = options.pairs or ([10_000, 1_000_000] if device.type == "cuda" else [10_000])
    common: dict[str, Any] = {
        "width": options.width, "k": options.k, "threads": options.threads, "device": device
    }  # fmt: skip
    command = f"python benchmarks/diagnostics_cost.py --device {options.device} --pairs {' '.join(map(str, sizes))}"
    command += f" --width {options.width} --k {options.k} --threads {options.threads}"
    kind: type[Cost] | type[SampledCost] = Cost
    run: Callable[[int], Cost | SampledCost] = partial(measure, **common)
    name = f"{options.device}_diagnostics_cost.csv"
    if options.max_queries is not None:
        kind, run = SampledCost, partial(measure_sampled, queries=options.max_queries, **common)
        name = f"{options.device}_diagnostics_cost_sampled.csv"
        command += f" --max-queries {options.max_queries}"
    run(max(500, 2 * options.k))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    lines = [f"# {date.today()}, {machine}, torch {torch.__version__}; {command}"]
    lines.append(",".join(field.name for field in fields(kind)))
    for pairs in sizes:
        lines.append(",".join(cell(name, value) for name, value in vars(run(pairs)).items()))
        print("\n".join(lines), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text("\n".join(lines) + "\n")


def cell(name: str, value: float) -> str:
    if name in ("recall", "largest_error"):
        return f"{value:.6f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
