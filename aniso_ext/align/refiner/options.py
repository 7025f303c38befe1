"""What the refinement may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aniso_ext.align.refiner.bounds import Bounds
from aniso_ext.align.training import TRAINING_ROWS
from aniso_ext.errors import InputError

_LEAST = {"projections": 1, "layers": 0, "training_rows": 2}


@dataclass(frozen=True)
class RefinementOptions:
    """Bounds, objectives and network of Stage II (METHOD section 4); its schedule is a ``TrainingOptions``.

    An objective of weight 0 is switched off. With all three off there is nothing to train, and the refiner stays at the
    closed form.

    Attributes:
        a_theta: largest turn of a phase, radians (METHOD D12).
        a_rho: largest change of a log radius.
        a_v: largest change of a coordinate of the complement; None is 0.1/sqrt(D).
        score_weight: of L_II, the prior's objective at theta^, per block.
        consistency_weight: of L_Phi, paper eq. (9).
        complement_weight: of the V-side objective (METHOD D15). The printed form has none.
        complement_penalty: of |a_v tanh dv|^2 within it.
        projections: random directions of its sliced Wasserstein distance.
        hidden: width of the hidden layers; None is 2D (METHOD D13).
        layers: residual hidden layers.
        training_rows: most rows of each side that are held in memory and trained on.

    Raises:
        InputError: a value is out of range; the message names the option.

    Example:
        >>> RefinementOptions(complement_weight=0).bounds(400).a_v
        0.005
    """

    a_theta: float = 0.1
    a_rho: float = 0.1
    a_v: float | None = None
    score_weight: float = 1.0
    consistency_weight: float = 1.0
    complement_weight: float = 1.0
    complement_penalty: float = 0.1
    projections: int = 64
    hidden: int | None = None
    layers: int = 1
    training_rows: int = TRAINING_ROWS

    def __post_init__(self) -> None:
        self.bounds(1)
        for name in ("score_weight", "consistency_weight", "complement_weight", "complement_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a finite number of at least 0, got {value!r}")
        least = {**_LEAST, **({} if self.hidden is None else {"hidden": 1})}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < smallest:
                raise InputError(f"{name} must be an integer of at least {smallest}, got {value!r}")

    def trains(self, literal: bool) -> bool:
        """Whether any objective is left."""
        weights = (self.score_weight, self.consistency_weight, 0 if literal else self.complement_weight)
        return any(weight > 0 for weight in weights)

    def bounds(self, width: int) -> Bounds:
        """The bounds at an embedding width."""
        return Bounds(self.a_theta, self.a_rho, 0.1 / math.sqrt(width) if self.a_v is None else self.a_v)
