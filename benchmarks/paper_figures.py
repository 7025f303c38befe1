"""The quantities of the paper's figures 1 and 2, drawn and measured on simulated pairs that have its constants.

    python benchmarks/paper_figures.py    # -> results/paper_gap.csv, ../docs/figures/paper_gap.png

The pairs are those of the gap simulator's default world, the paper's constants at width 1280. Each constant is measured
and compared with the paper's; the exit code is 1 if one is further off than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext import diagnostics
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import write_table
from aniso_ext.diagnostics import GapReport, figures, spectra
from aniso_ext.diagnostics.gap import OverlapPoint
from aniso_ext.worlds import GapWorld, simulate_gap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "paper_gap.csv"
PICTURE = REPOSITORY / "docs" / "figures" / "paper_gap.png"
PAPER = {
    "c_lambda": 0.845,
    "o_q": 0.441,
    "g_mu": 0.392,
    "g_sigma": 0.066,
    "d_center": 1.264,
    "r_res": 0.89,
    "a_r": 28.6,
    "d_eff_ratio": 0.284,
}
DOTS_PER_INCH = 130


def compare(gap: GapReport, tolerance: float) -> list[dict[str, Any]]:
    """One line for each constant: wanted, measured, relative difference, and whether that is within the tolerance."""
    rows = []
    for name, wanted in PAPER.items():
        measured = float(getattr(gap, name))
        difference = measured / wanted - 1
        rows.append(
            {
                "constant": name,
                "wanted": wanted,
                "measured": round(measured, 5),
                "relative_difference": round(difference, 4),
                "within": "yes" if abs(difference) <= tolerance else "no",
            }
        )
    return rows


def with_overlap_curve(gap: GapReport, source: np.ndarray, target: np.ndarray) -> GapReport:
    """The report with O_q over powers of two, where it has no curve."""
    if gap.overlap:
        return gap
    first, second = (
        spectra.eigenpairs(spectra.covariance(torch.from_numpy(rows).double()))[1] for rows in (source, target)
    )
    ranks = [2**power for power in range(gap.width.bit_length()) if 2**power < gap.width] + [gap.width]
    curve = tuple(OverlapPoint(q, spectra.subspace_overlap(first[:, :q], second[:, :q]), q / gap.width) for q in ranks)
    return replace(gap, overlap=curve)


def sheet(gap: GapReport) -> np.ndarray:
    """All five figures of a gap on one page, two columns wide, RGB."""
    pairs = [
        (figures.covariance_spectra(gap), figures.subspace_overlap(gap)),
        (figures.residual_spectrum(gap), figures.cumulative_energy(gap)),
    ]
    width = round(2 * pairs[0][0].get_figwidth() * DOTS_PER_INCH)
    rows = [_beside([_pixels(figure) for figure in pair]) for pair in pairs]
    rows.append(_pixels(figures.bias_and_residual(gap, width=width / DOTS_PER_INCH)))
    strip = np.full((round(0.12 * DOTS_PER_INCH), width, 3), 255, dtype=np.uint8)
    return np.concatenate([part for row in rows for part in (strip, _padded(row, row.shape[0], width))])


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(DOTS_PER_INCH)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]


def _beside(images: list[np.ndarray]) -> np.ndarray:
    height = max(image.shape[0] for image in images)
    return np.concatenate([_padded(image, height, image.shape[1]) for image in images], axis=1)


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """White below and to the right; what rounding has made too wide is cut."""
    page = np.full((height, width, 3), 255, dtype=np.uint8)
    page[: image.shape[0], : image.shape[1]] = image[:height, :width]
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=GapWorld().pairs, help="pairs to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest relative difference")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    source, target = simulate_gap(arguments.pairs, seed=arguments.seed)
    gap = diagnostics.gap(source, target)
    rows = compare(gap, arguments.tolerance)
    for row in rows:
        print(
            f"{row['constant']:<12} wanted {row['wanted']:<6} measured {row['measured']:<8.5g} "
            f"{row['relative_difference']:+.1%}  {'' if row['within'] == 'yes' else 'too far'}".rstrip()
        )
    header = {**facts(torch.device("cpu")), "pairs": str(arguments.pairs), "seed": str(arguments.seed)}
    write_table(arguments.csv, header, rows)

    from matplotlib.image import imsave

    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    imsave(arguments.picture, sheet(with_overlap_curve(gap, source, target)))
    print(f"written: {arguments.csv}\nwritten: {arguments.picture}")
    return 0 if all(row["within"] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
