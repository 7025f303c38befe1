"""Figures of the reports: one function each, from report dataclasses to a ``matplotlib.figure.Figure``.

Figures use no global state and no display; ``figure.savefig("gap.pdf")`` writes any format that matplotlib knows. They
need matplotlib, the extra ``plots``, which is loaded when one is drawn. Every function takes ``theme="light"`` or
``"dark"`` and ``width`` in inches.
"""

from __future__ import annotations

from aniso_ext.diagnostics.figures.gap import (
    bias_and_residual,
    covariance_spectra,
    cumulative_energy,
    residual_spectrum,
    subspace_overlap,
)
from aniso_ext.diagnostics.figures.methods import (
    consistency,
    mixing_plane,
    penetration_and_coverage,
    relative_discrepancies,
    residual_spectra,
)
from aniso_ext.diagnostics.figures.phases import phase_couplings, phase_marginals, radius_maps
from aniso_ext.diagnostics.figures.rows import correction_sizes, joint_projection

__all__ = [
    "bias_and_residual",
    "consistency",
    "correction_sizes",
    "covariance_spectra",
    "cumulative_energy",
    "joint_projection",
    "mixing_plane",
    "penetration_and_coverage",
    "phase_couplings",
    "phase_marginals",
    "radius_maps",
    "relative_discrepancies",
    "residual_spectra",
    "residual_spectrum",
    "subspace_overlap",
]
