"""Frames and rows of the tests: those that the benchmarks use."""

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
    "named",
    "rows_of",
    "rows_on",
]
