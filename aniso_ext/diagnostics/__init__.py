"""Measuring a modality gap and what a transform makes of it (METHOD section 1).

``gap``, ``alignment``, ``projection`` and ``corrections`` are the functions; their modules of the same names are an
implementation detail. ``aniso_ext.diagnostics.figures`` draws the reports and is loaded when it is imported.
"""

from __future__ import annotations

from aniso_ext.diagnostics.alignment import AlignmentReport, alignment
from aniso_ext.diagnostics.consistency import phi_bound
from aniso_ext.diagnostics.corrections import CorrectionReport, corrections
from aniso_ext.diagnostics.gap import EnergyPoint, GapReport, gap
from aniso_ext.diagnostics.mixing import mixing_expectation
from aniso_ext.diagnostics.oracle import OraclePathReport, OraclePoint, oracle_path
from aniso_ext.diagnostics.phases import PhaseReport, phase_report
from aniso_ext.diagnostics.projection import ProjectionReport, projection
from aniso_ext.diagnostics.report import DiagnosticsWarning

__all__ = [
    "AlignmentReport",
    "CorrectionReport",
    "DiagnosticsWarning",
    "EnergyPoint",
    "GapReport",
    "OraclePathReport",
    "OraclePoint",
    "PhaseReport",
    "ProjectionReport",
    "alignment",
    "corrections",
    "gap",
    "mixing_expectation",
    "oracle_path",
    "phase_report",
    "phi_bound",
    "projection",
]
