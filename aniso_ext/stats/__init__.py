"""Statistics that stream and merge: moments, radius quantiles and phase moments in memory independent of N.

Every accumulator has ``update(batch)``, ``merge(other)``, ``state_dict()`` and ``from_state_dict(state)``. Shards may
be merged in any order: the results agree to 1e-10 (radius counts agree exactly). A rejected batch leaves the state as
it was.
"""

from aniso_ext.stats.moments import Moments, fit_moments
from aniso_ext.stats.phase_moments import PhaseMoments
from aniso_ext.stats.radius_sketch import RadiusSketch

__all__ = ["Moments", "PhaseMoments", "RadiusSketch", "fit_moments"]
