"""Stage I: what the phases of the target do, learned from target embeddings alone (METHOD section 3)."""

from aniso_ext.align.prior.fitting import PriorOptions, fit_prior
from aniso_ext.align.prior.graph import PhaseGraph
from aniso_ext.align.prior.network import ScoreNetwork
from aniso_ext.align.prior.prior import PhasePrior
from aniso_ext.align.prior.sampling import PhaseComparison, compare_phases, sample_phases

__all__ = [
    "PhaseComparison",
    "PhaseGraph",
    "PhasePrior",
    "PriorOptions",
    "ScoreNetwork",
    "compare_phases",
    "fit_prior",
    "sample_phases",
]
