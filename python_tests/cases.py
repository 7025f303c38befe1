"""Frames and rows of the tests: those that the benchmarks use, and worse ones."""

import torch

from aniso_ext.bench.problems import (
    BRANCHES,
    COMPLEMENTS,
    ENCODERS,
    Case,
    arrays_of,
    calibrated,
    deltas_of,
    deltas_on,
    frame_of,
    named,
    rows_of,
    rows_on,
)
from aniso_ext.ops import Frame

__all__ = [
    "BRANCHES",
    "COMPLEMENTS",
    "ENCODERS",
    "Case",
    "arrays_of",
    "calibrated",
    "deltas_of",
    "deltas_on",
    "frame_of",
    "frame_with_jumps",
    "named",
    "rows_of",
    "rows_on",
]


def frame_with_jumps(case: Case, knots: int) -> Frame:
    """A frame whose radius maps jump after every so many knots, and are flat in between."""
    arrays = {name: torch.tensor(value) for name, value in arrays_of(case).items()}
    steps = torch.arange(case.knots, dtype=torch.float64).div(knots, rounding_mode="floor")
    arrays["radius_target_knots"] = (0.1 + 0.02 * steps).expand(case.blocks, -1).contiguous()
    return Frame.from_tensors(arrays, complement=case.complement, center=case.center)
