"""Measuring a modality gap and what a transform makes of it (METHOD section 1).

``gap`` and ``alignment`` are the functions; their modules of the same names are an implementation detail.
"""

from __future__ import annotations

from aniso_ext.diagnostics.alignment import AlignmentReport, alignment
from aniso_ext.diagnostics.consistency import phi_bound
from aniso_ext.diagnostics.gap import EnergyPoint, GapReport, gap
from aniso_ext.diagnostics.mixing import mixing_expectation
from aniso_ext.diagnostics.oracle import OraclePathReport, OraclePoint, oracle_path
from aniso_ext.diagnostics.report import DiagnosticsWarning

__all__ = [
    "AlignmentReport",
    "DiagnosticsWarning",
    "EnergyPoint",
    "GapReport",
    "OraclePathReport",
    "OraclePoint",
    "alignment",
    "gap",
    "mixing_expectation",
    "oracle_path",
    "phi_bound",
]
