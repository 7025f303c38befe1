"""Stage II: the bounded refinement of the closed form (METHOD section 4, D11-D16)."""

from aniso_ext.align.refiner.bounds import BoundReport, Bounds, CollapseReport, effective_bound, similarity_guarantee
from aniso_ext.align.refiner.network import FoldedRefiner, Refiner

__all__ = [
    "BoundReport",
    "Bounds",
    "CollapseReport",
    "FoldedRefiner",
    "Refiner",
    "effective_bound",
    "similarity_guarantee",
]
