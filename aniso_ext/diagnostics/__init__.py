"""Measuring a modality gap and what a transform makes of it (METHOD section 1).

``gap``, ``alignment``, ``projection``, ``corrections``, ``study``, ``verdict`` and ``compare`` are the functions; their
modules of the same names are an implementation detail. ``aniso_ext.diagnostics.figures`` draws the reports and is
loaded when it is imported, ``aniso_ext.diagnostics.html`` when a study is shown or saved.
"""

from __future__ import annotations

from aniso_ext.diagnostics.alignment import AlignmentReport, alignment
from aniso_ext.diagnostics.compare import Comparison, compare
from aniso_ext.diagnostics.consistency import phi_bound
from aniso_ext.diagnostics.corrections import CorrectionReport, corrections
from aniso_ext.diagnostics.gap import EnergyPoint, GapReport, gap
from aniso_ext.diagnostics.mixing import mixing_expectation
from aniso_ext.diagnostics.oracle import OraclePathReport, OraclePoint, oracle_path
from aniso_ext.diagnostics.phases import PhaseReport, phase_report
from aniso_ext.diagnostics.projection import ProjectionReport, projection
from aniso_ext.diagnostics.report import DiagnosticsWarning
from aniso_ext.diagnostics.study import Origin, Study, StudyOptions, study
from aniso_ext.diagnostics.verdict import Verdict, verdict

__all__ = [
    "AlignmentReport",
    "Comparison",
    "CorrectionReport",
    "DiagnosticsWarning",
    "EnergyPoint",
    "GapReport",
    "OraclePathReport",
    "OraclePoint",
    "Origin",
    "PhaseReport",
    "ProjectionReport",
    "Study",
    "StudyOptions",
    "Verdict",
    "alignment",
    "compare",
    "corrections",
    "gap",
    "mixing_expectation",
    "oracle_path",
    "phase_report",
    "phi_bound",
    "projection",
    "study",
    "verdict",
]
