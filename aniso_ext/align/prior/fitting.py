"""Stage I: from target embeddings to a trained, frozen phase prior (METHOD section 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from aniso_ext.align.prior.graph import PARTNERS, PhaseGraph
from aniso_ext.align.prior.network import BLOCKS, WIDTH
from aniso_ext.align.prior.prior import PhasePrior
from aniso_ext.align.rows import Rows
from aniso_ext.align.training import (
    TRAINING_ROWS,
    Progress,
    RowSampler,
    TrainingLog,
    TrainingOptions,
    TrainingRows,
    train,
)
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame
from aniso_ext.ops.reference import polar
from aniso_ext.stats import Moments, PhaseMoments

STAGE = "prior"


@dataclass(frozen=True)
class PriorOptions:
    """What Stage I may be told beside its training.

    Attributes:
        partners: p of METHOD D5.
        connected: whether couplings leave out the share of the means (METHOD D5).
        width, blocks: of the score network (METHOD D8).
        training_rows: most rows held in memory to train on; the statistics see all rows.
    """

    partners: int = PARTNERS
    connected: bool = False
    width: int = WIDTH
    blocks: int = BLOCKS
    training_rows: int = TRAINING_ROWS

    def __post_init__(self) -> None:
        for name, least in (("partners", 0), ("width", 1), ("blocks", 0), ("training_rows", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.connected, bool):
            raise InputError(f"connected must be True or False, got {self.connected!r}")


@dataclass(frozen=True)
class PhaseStatistics:
    """What one pass over the target gives: moments of its phases and radii, and a sample to train on.

    ``sample`` is float32 [n, 2M]: phases, then log radii.
    """

    phases: PhaseMoments
    mean_squared_radius: torch.Tensor
    log_radius_mean: torch.Tensor
    log_radius_std: torch.Tensor
    sample: torch.Tensor


def fit_prior(
    target: Rows,
    frame: Frame,
    options: TrainingOptions,
    prior_options: PriorOptions | None = None,
    *,
    device: torch.device | str | None = None,
    log: TrainingLog | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[PhasePrior, dict[str, Any]]:
    """Fit the phase prior of a target corpus in a frame: one pass over the rows, then training in memory.

    Args:
        target: rows of the target modality.
        frame: the fitted frame: its basis, and its target mean where coordinates are centred (METHOD D4).
        options: schedule and optimiser; the seed also draws the sample and the initial weights.
        prior_options: graph and network.
        device: where to train; None for the CPU. The prior stays there.
        log, checkpoint, progress: as for :func:`aniso_ext.align.training.train`.

    Returns:
        The frozen prior, and a summary: prior_edges, prior_tau, prior_resultant_mean (of |E e^{i theta_k}|),
        prior_training_rows, prior_steps, prior_best_step, prior_stopped_early, prior_loss_before and _after (held-out
        objective per block; before is that of a score of zero).

    Raises:
        InputError: too few rows, rows that are not finite, or a width that is not the frame's.
        TrainingError, DataError: as for training.
    """
    wanted = prior_options or PriorOptions()
    statistics = phase_statistics(target, frame, most=wanted.training_rows, seed=options.seed)
    graph = PhaseGraph.from_moments(
        statistics.phases, statistics.mean_squared_radius, partners=wanted.partners, connected=wanted.connected
    )
    resultant = torch.from_numpy(np.abs(statistics.phases.first)).clamp_max(1)
    prior = PhasePrior(
        graph,
        resultant,
        statistics.log_radius_mean,
        statistics.log_radius_std,
        width=wanted.width,
        blocks=wanted.blocks,
        seed=options.seed,
    ).to(device)
    rows = TrainingRows.split(
        statistics.sample.to(device),
        name=f"{target.name} phases",
        fingerprint=f"{target.fingerprint()}:{frame.fingerprint()}",
        seed=options.seed,
    )
    record = train(
        prior,
        denoising_loss,
        rows,
        options,
        name=STAGE,
        identity={**asdict(wanted), "graph": graph.fingerprint()},
        log=log,
        checkpoint=checkpoint,
        progress=progress,
    )
    summary = {
        "prior_edges": len(graph.edges),
        "prior_tau": float(graph.tau),
        "prior_resultant_mean": float(resultant.mean()),
        "prior_training_rows": len(rows.train),
        **record.summary(),
    }
    return prior.freeze(), summary


def denoising_loss(
    prior: PhasePrior, batch: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The Stage I objective per block for rows [n, 2M] of phases and log radii."""
    theta, log_rho = batch.chunk(2, dim=-1)
    return prior.loss(theta, log_rho, generator) / prior.phases, {}


def phase_statistics(target: Rows, frame: Frame, *, most: int, seed: int) -> PhaseStatistics:
    """One float64 pass over the target: polar coordinates of its blocks, their moments, and ``most`` sampled rows."""
    if target.width != frame.width:
        raise InputError(f"{target.name} has width {target.width}, the frame has {frame.width}")
    if target.count < 2:
        raise InputError(f"{target.name} has {target.count} rows: the phase prior needs at least 2")
    basis = frame.basis.to(device="cpu", dtype=torch.float64)
    origin = frame.target_mean.to(device="cpu", dtype=torch.float64) if frame.center else 0.0
    phases = PhaseMoments(frame.blocks)
    log_radii, squared_radii = Moments(frame.blocks, diagonal=True), Moments(frame.blocks, diagonal=True)
    sampler = RowSampler(target.count, most, seed=seed, name=target.name, share=target.share)
    for batch in target.exact_batches():
        radius, cos, sin = polar((batch - origin) @ basis)
        theta, log_radius = torch.atan2(sin, cos), radius.log()
        phases.update(theta.numpy())
        log_radii.update(log_radius.numpy())
        squared_radii.update(radius.square().numpy())
        sampler.take(torch.cat((theta, log_radius), dim=-1))
    log_radii, squared_radii = target.merged(log_radii), target.merged(squared_radii)
    return PhaseStatistics(
        phases=target.merged(phases),
        mean_squared_radius=torch.from_numpy(squared_radii.mean),
        log_radius_mean=torch.from_numpy(log_radii.mean),
        log_radius_std=torch.from_numpy(log_radii.std),
        sample=target.gathered(sampler.rows()),
    )
