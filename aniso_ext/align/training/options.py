"""How a stage is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from aniso_ext.errors import InputError

_LEAST = {"steps": 0, "batch_rows": 1, "warmup_steps": 0, "evaluate_every": 1, "patience": 0, "seed": 0}


@dataclass(frozen=True)
class TrainingOptions:
    """Schedule and optimiser of one stage (METHOD sections 3 and 4).

    Attributes:
        steps: optimiser steps; 0 trains nothing and measures the start only.
        batch_rows: rows of a global batch, over all processes.
        learning_rate: its peak: linear warm-up over ``warmup_steps``, then a cosine down to zero at ``steps``.
        warmup_steps: 0 starts at the peak.
        weight_decay: of AdamW, on matrices; biases and other vectors are not decayed.
        ema: decay of the averaged weights, in [0, 1); early on it is (1 + t)/(10 + t), so that short runs forget
            their start too.
        evaluate_every: steps between held-out losses.
        patience: held-out losses in a row without a new best after which training stops; 0 never stops early.
        checkpoint_every: steps between checkpoints; 0 keeps only the last one.
        autocast: bfloat16 matrix products on CUDA; nothing changes on other devices.
        seed: of batches and noise; what happens at a step is a function of (seed, step).

    Raises:
        InputError: a value is out of range; the message names the option.

    Example:
        >>> TrainingOptions(steps=200, batch_rows=512).learning_rate
        0.001
    """

    steps: int = 1000
    batch_rows: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    ema: float = 0.999
    evaluate_every: int = 50
    patience: int = 6
    checkpoint_every: int = 250
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (*_LEAST.items(), ("checkpoint_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value < 2**63:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("learning_rate", "weight_decay", "ema"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
            if value < 0:
                raise InputError(f"{name} must not be negative, got {value!r}")
        if self.ema >= 1:
            raise InputError(f"ema must be below 1, got {self.ema!r}")
        if not isinstance(self.autocast, bool):
            raise InputError(f"autocast must be True or False, got {self.autocast!r}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * (step - self.warmup_steps) / span)) / 2

    def decay(self, step: int) -> float:
        """The decay of the averaged weights at step 0, 1, ...: min(ema, (1 + t)/(10 + t))."""
        return min(self.ema, (1 + step) / (10 + step))

    def identity(self) -> dict[str, Any]:
        """The options that decide the result, as plain numbers; how often checkpoints are written is none of them."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "checkpoint_every"}
        return {name: value if isinstance(value, bool) else float(value) for name, value in values.items()}
