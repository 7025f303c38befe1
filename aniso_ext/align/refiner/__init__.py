"""Stage II: the bounded refinement of the closed form (METHOD section 4, D11-D16)."""

from aniso_ext.align.refiner.bounds import BoundReport, Bounds, CollapseReport, effective_bound, similarity_guarantee
from aniso_ext.align.refiner.fitting import fit_refiner
from aniso_ext.align.refiner.inference import RefinedMap
from aniso_ext.align.refiner.network import FoldedRefiner, Refiner
from aniso_ext.align.refiner.options import RefinementOptions

__all__ = [
    "BoundReport",
    "Bounds",
    "CollapseReport",
    "FoldedRefiner",
    "RefinedMap",
    "RefinementOptions",
    "Refiner",
    "effective_bound",
    "fit_refiner",
    "similarity_guarantee",
]
