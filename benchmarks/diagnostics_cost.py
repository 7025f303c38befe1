"""Seconds and memory of all diagnostics for simulated pairs; writes benchmarks/results/diagnostics_cost.csv.

    python benchmarks/diagnostics_cost.py --pairs 10000 --width 1280 --threads 2
"""

from __future__ import annotations

import argparse
import resource
import time
from datetime import date
from pathlib import Path

import torch

import aniso_ext as aniso

RESULTS = Path(__file__).resolve().parent / "results" / "diagnostics_cost.csv"


def seconds(function: object, *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source, target = aniso.worlds.simulate_gap(options.pairs, world=aniso.worlds.GapWorld(width=options.width))
    stand_ins = aniso.make_aligner("realign").fit(source, target).transform(source)
    gap = seconds(aniso.diagnostics.gap, source, target)
    alignment = seconds(aniso.diagnostics.alignment, source, target, stand_ins)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    command = f"python benchmarks/diagnostics_cost.py --pairs {options.pairs} --width {options.width}"
    lines = [
        f"# {date.today()}, torch {torch.__version__}; {command} --threads {options.threads}",
        "pairs,width,threads,gap_seconds,alignment_seconds,peak_gb",
        f"{options.pairs},{options.width},{options.threads},{gap:.1f},{alignment:.1f},{peak:.2f}",
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
