"""Both trained stages in a row: the phase prior of the target, then the refiner under it (METHOD sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from aniso_ext.align.prior import PhasePrior, PriorOptions, fit_prior
from aniso_ext.align.refiner import RefinementOptions, Refiner, fit_refiner
from aniso_ext.align.rows import Rows
from aniso_ext.align.training import Progress, TrainingLog, TrainingOptions
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame

PRIOR_TRAINING = TrainingOptions(steps=600, learning_rate=3e-3)
"""Schedule of Stage I where none is given."""
REFINEMENT_TRAINING = TrainingOptions(steps=300)
"""Schedule of Stage II where none is given."""

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StageOptions:
    """Options of both stages; the names are those of AnisoAlign."""

    prior: PriorOptions
    prior_training: TrainingOptions
    refinement: RefinementOptions
    refinement_training: TrainingOptions
    literal: bool
    seed: int


@dataclass(frozen=True)
class FitRun:
    """Where one run of ``fit`` keeps its state and tells what it does; nothing of it decides the result."""

    checkpoint_dir: str | PathLike[str] | None = None
    log_dir: str | PathLike[str] | None = None
    tensorboard: bool = False
    progress: StageProgress | None = None

    def stage(self, name: str) -> dict[str, Any]:
        """The arguments ``log``, ``checkpoint`` and ``progress`` of one stage."""
        return {
            "log": None if self.log_dir is None else TrainingLog(self.log_dir, tensorboard=self.tensorboard),
            "checkpoint": None if self.checkpoint_dir is None else Path(self.checkpoint_dir) / f"{name}.pt",
            "progress": self._progress(name),
        }

    def _progress(self, name: str) -> Progress | None:
        watcher = self.progress
        if watcher is None:
            return None

        def report(done: int, total: int, losses: Mapping[str, float]) -> None:
            watcher(name, done, total)

        return report


def check_stage_options(options: Mapping[str, Any]) -> None:
    """Refuse options of AnisoAlign that are neither None nor of their class."""
    for name, kind in OPTION_TYPES.items():
        value = options[name]
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__} or None, got {value!r}")


OPTION_TYPES: dict[str, type] = {
    "prior": PriorOptions,
    "prior_training": TrainingOptions,
    "refinement": RefinementOptions,
    "refinement_training": TrainingOptions,
}


def stage_options(options: Mapping[str, Any], *, literal: bool, seed: int) -> StageOptions:
    """Options of AnisoAlign with their defaults filled in; the seed of the aligner is that of both stages."""
    return StageOptions(
        prior=options["prior"] or PriorOptions(),
        prior_training=replace(options["prior_training"] or PRIOR_TRAINING, seed=seed),
        refinement=options["refinement"] or RefinementOptions(),
        refinement_training=replace(options["refinement_training"] or REFINEMENT_TRAINING, seed=seed),
        literal=literal,
        seed=seed,
    )


def fit_stages(
    source: Rows,
    target: Rows,
    frame: Frame,
    options: StageOptions,
    run: FitRun,
    *,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> tuple[PhasePrior, Refiner, dict[str, Any]]:
    """Train Stage I on the target and Stage II on both sides, in a fitted frame.

    Returns:
        Prior and refiner, both frozen and on the CPU, and the numbers of both stages.
    """
    prior, record = fit_prior(target, frame, options.prior_training, options.prior, device=device, **run.stage("prior"))
    refiner, refined = fit_refiner(
        source,
        target,
        frame,
        prior,
        options.refinement,
        options.refinement_training,
        literal=options.literal,
        device=device,
        backend=backend,
        **run.stage("refiner"),
    )
    return prior.cpu(), refiner.requires_grad_(False).eval(), record | refined
