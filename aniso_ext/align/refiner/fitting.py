"""Stage II: train the refiner on unpaired rows, and measure what it does (METHOD section 4, D11-D16)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from aniso_ext.align.refiner.bounds import BoundSurvey, CollapseWatch, effective_bound
from aniso_ext.align.refiner.inference import RefinedMap
from aniso_ext.align.refiner.network import Refiner
from aniso_ext.align.refiner.objective import Objective
from aniso_ext.align.refiner.options import RefinementOptions
from aniso_ext.align.rows import BATCH_ROWS, Rows, mean_of
from aniso_ext.align.training import Progress, TrainingLog, TrainingOptions, TrainingRows, UnpairedRows, train
from aniso_ext.ops import Frame, encode

if TYPE_CHECKING:
    from aniso_ext.align.prior import PhasePrior

STAGE = "refiner"


def fit_refiner(
    source: Rows,
    target: Rows,
    frame: Frame,
    prior: PhasePrior,
    options: RefinementOptions,
    training: TrainingOptions,
    *,
    literal: bool = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
    log: TrainingLog | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Refiner, dict[str, Any]]:
    """Train the refiner in a fitted frame under a frozen prior (METHOD section 4).

    Args:
        source: rows to be refined; at most ``options.training_rows`` of them are trained on, all are surveyed.
        target: rows of the target, for the V-side objective and the collapse watch.
        frame: of both sides; its calibration plays no part.
        prior: of Stage I, frozen; it is moved to ``device``.
        options: bounds, objectives, network.
        training: schedule and optimiser; its seed is that of everything random. Without objectives no step is done.
        literal: the printed form of D11, D14 and D15.
        device: where to train; None is the CPU. bfloat16 products on CUDA.
        backend: of the operations.
        log: where losses are written, as stage ``refiner``.
        checkpoint: file to save the state to and to go on from.
        progress: called as progress(steps done, steps, losses).

    Returns:
        The refiner, on the CPU, and the numbers of the stage: held-out losses before and after, eps_eff and the
        guarantee, concentrations of the phases.

    Warns:
        UserWarning: a block has collapsed (METHOD D16).
    """
    place = torch.device("cpu" if device is None else device)
    frame = frame.with_output_mean(None).to(device=place)
    refiner = Refiner(
        frame.blocks,
        frame.width,
        hidden=options.hidden,
        layers=options.layers,
        bounds=options.bounds(frame.width),
        literal=literal,
        seed=training.seed,
    ).to(place)
    most, seed = options.training_rows, training.seed
    rows = UnpairedRows(
        TrainingRows.sample(source, most=most, seed=seed, device=place),
        TrainingRows.sample(target, most=most, seed=seed, device=place),
    )
    refiner.standardise(*state_moments(rows.source.train, frame, backend))
    trace = complement_trace(rows.target.train, frame)
    record = train(
        refiner,
        Objective(frame, prior.to(place), options, trace=trace, literal=literal, backend=backend),
        rows,
        training if options.trains(literal) else replace(training, steps=0),
        name=STAGE,
        identity={"frame": frame.fingerprint(), "prior": _hash(prior), "literal": literal, **asdict(options)},
        log=log,
        checkpoint=checkpoint,
        progress=progress,
    )
    survey = survey_rows(source, frame, refiner, CollapseWatch(prior.resultant, target.count), backend)
    return refiner.cpu(), {**record.summary(), **survey}


def state_moments(rows: torch.Tensor, frame: Frame, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [3M + D] of the states of rows [n, D], in two passes."""

    def states() -> Iterator[torch.Tensor]:
        for batch in rows.split(BATCH_ROWS):
            yield encode(batch.float(), frame, backend=backend).double()

    mean = mean_of(states())
    return mean, mean_of((state - mean).square() for state in states()).sqrt()


def complement_trace(rows: torch.Tensor, frame: Frame) -> float:
    """tr S_V of rows [n, D]: their variance outside the basis, 0 where there is no outside."""
    if frame.rank == frame.width:
        return 0.0
    basis = frame.basis.double()
    mean = mean_of(batch.double() for batch in rows.split(BATCH_ROWS))
    total = 0.0
    for batch in rows.split(BATCH_ROWS):
        centred = batch.double() - mean
        total += float((centred - centred @ basis @ basis.T).square().sum())
    return total / len(rows)


def survey_rows(
    source: Rows,
    frame: Frame,
    refiner: Refiner,
    watch: CollapseWatch,
    backend: str = "auto",
) -> dict[str, Any]:
    """eps_eff, the guarantee and the collapse watch over all source rows, in one pass (METHOD D12, D16)."""
    refined, eps = RefinedMap(refiner), BoundSurvey()
    single, blocks = frame.to(dtype=torch.float32), frame.blocks
    for batch in source.batches():
        state, deltas = refined.update(batch.to(frame.device, torch.float32), frame, backend=backend)
        eps.update(effective_bound(state, deltas, single, refiner.bounds, literal=refiner.literal))
        watch.update(
            state[:, :blocks], state[:, blocks : 2 * blocks], refiner.bounds.a_theta * deltas[:, :blocks].tanh()
        )
    eps.gather(source)
    watch.gather(source)
    report = watch.report()
    warning = report.warning()
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return {**eps.report().summary(), **report.summary()}


def _hash(prior: PhasePrior) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(prior.tensors().items()):
        digest.update(f"{name}:{list(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()
