"""AnisoAlign: the closed form in a fitted frame, then the bounded refinement under a phase prior (METHOD 2 to 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from aniso_ext.align.base import Aligner, Arrays, Fields
from aniso_ext.align.fitting import SLOPE_LIMIT, FrameOptions, calibrate, check_rank, fit_frame
from aniso_ext.align.mixing import check_mixing
from aniso_ext.align.prior import PhasePrior, PriorOptions
from aniso_ext.align.refiner import RefinedMap, RefinementOptions, Refiner
from aniso_ext.align.registry import register
from aniso_ext.align.rows import Rows, check_row_count
from aniso_ext.align.stages import (
    OPTION_TYPES,
    FitRun,
    StageProgress,
    check_stage_options,
    fit_stages,
    stage_options,
)
from aniso_ext.align.training import TrainingOptions
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame, correct, correct_sums
from aniso_ext.ops.backends import resolve
from aniso_ext.ops.frame import COMPLEMENTS, MOST_KNOTS, TENSOR_FIELDS

if TYPE_CHECKING:
    from aniso_ext.align.rows import Embeddings

CLOSED_FORM_MEAN = "closed_form.output_mean"
"""Name of the array m_hat of e' before the refinement: what :meth:`AnisoAlign.closed_form` is calibrated with."""


@register("anisoalign")
class AnisoAlign(Aligner):
    """Anisotropic alignment: a closed form for radii and complement, refined within bounds towards the target's phases.

    With y~ = y - m_s, Q [D, R] the mixed top eigenvectors of S_source + S_target and V their complement:

        c = Q^T (y~ + m_t) in polar blocks (rho_k, theta_k);  c^ has radii T_k(rho_k) and the same phases
        v0 = m_t,V + D_V y~_V                                                  (METHOD section 4, paper eq. (7))
        theta^ = theta + a_theta tanh(dtheta);  rho^ = T(rho) exp(a_rho tanh(drho));  v^ = v0 + (a_v tanh(dv))_V
        e' = Norm(Q c^ + v^);  e = Norm(e' - m_hat + m_t)

    where (dtheta, drho, dv) is the output of the refiner, a network trained on unpaired rows under a prior of the
    target's phases (METHOD sections 3 and 4). ``refine=False`` stops at the closed form, all three of them zero.

    The frame is fitted in two streaming passes over each side (moments, radii), the prior in one over the target. Both
    stages train on a random sample of the rows in memory. The refiner's bounds are measured in one pass over the
    source, the calibration takes one, one per fixed-point step and one that measures what is left, for the closed form
    as well. The frame is fitted in float64; on the CPU everything is a function of the data, the options and ``seed``
    to the bit. A transformed row depends on that row alone, to the rounding of the matrix products, unless the
    calibration is ``corpus``.

    Args:
        rank: R, even, or a float in (0, 1]: the share of the energy of S_J to hold (METHOD D2).
        mixing: what shares a block (METHOD D3): ``haar`` (a random rotation from ``seed``, chosen in
            docs/method_choices.md), ``balanced`` (strong directions with weak ones), ``pca_adjacent``, or
            ``phase_stable`` (learned from the target: blocks about whose phases its halves agree).
        complement: ``scalar``, ``diagonal`` (the paper's) or ``diagonal_projected`` with ratios clamped to [1/4, 4]
            (METHOD D10).
        refine: train both stages and refine; False stops at the closed form.
        calibration: ``fitted`` keeps m_hat of the fitted source in the frame; ``corpus`` takes it from each corpus that
            is transformed (two passes); None leaves the calibration off (METHOD D17).
        calibration_steps: fixed-point steps that drive |mean(e) - m_t| down.
        center: polar coordinates of centred coordinates; the paper's are uncentred (METHOD D4).
        knots: K of the radius maps (METHOD D9).
        slope_limit: steepest slope of a radius map, in units of its block's overall ratio of target to source radii;
            None allows any. Where copies among the source rows make T_k jump, the limit keeps a rounding error of a
            radius a rounding error of the result (docs/method_choices.md).
        prior: graph and network of Stage I, :class:`~aniso_ext.align.PriorOptions`; None for its defaults.
        prior_training: its schedule, :class:`~aniso_ext.align.TrainingOptions`. The seed is that of the aligner.
        refinement: bounds, objectives and network of Stage II, :class:`~aniso_ext.align.RefinementOptions`.
        refinement_training: its schedule.
        literal: the paper's printed form of every decision: uncentred, ``diagonal`` complement, ``corpus`` calibration
            without steps and no slope limit, whatever those options say; in the refinement the projection before the
            tanh (METHOD D11), 1/|E| in L_Phi (D14) and no objective for the complement (D15).
        seed: of the ``haar`` mixing and of everything random in the two stages.
        device: where rows are transformed, products of the statistics made and the stages trained; None leaves rows
            where they are, and makes and trains on the CPU.
        backend: of the operations, :func:`aniso_ext.ops.correct` and its like.

    Attributes:
        frame_: the fitted :class:`aniso_ext.Frame`, float64 on the CPU.
        prior_, refiner_: the trained :class:`~aniso_ext.align.prior.PhasePrior` and
            :class:`~aniso_ext.align.refiner.Refiner`; None without refinement.
        summary_: rank, coverage (share of S_J, of S_source, of S_target), ridge (lambda of METHOD D1, for the record:
            it moves no eigenvector), centroid_gap, complement_scale, calibration_error_before and _after. With
            refinement also: edges, steps and held-out losses of the prior before and after; the same of the refiner;
            eps_eff and similarity_guarantee, the most that a cosine of two rows can have changed (METHOD D12);
            the concentration of the phases (METHOD D16).

    Example:
        >>> import numpy as np, aniso_ext as aniso
        >>> rows = np.random.default_rng(0).standard_normal((300, 8)) + 1
        >>> unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        >>> aligner = aniso.AnisoAlign(rank=4, refine=False).fit(unit[:200], -unit[100:])
        >>> aligner.transform(unit[:3]).shape
        (3, 8)
    """

    fields: ClassVar[Fields] = {
        "source_mean": ("D",),
        "target_mean": ("D",),
        "basis": ("D", "R"),
        "radius_source_knots": ("M", "K"),
        "radius_target_knots": ("M", "K"),
        "complement_scale": ("1 or D",),
        "output_mean": ("D",),
    }
    optional_fields = frozenset({"output_mean"})
    option_types = OPTION_TYPES
    part_prefixes = ("prior.", "refiner.", "closed_form.")
    transform_options = ("refine", "complement", "center", "calibration", "calibration_steps", "literal")
    runtime_options = ("device", "backend")
    tile_bytes = None

    baseline = False
    frame_: Frame
    _bare: Frame
    """The frame without its calibration, with kernel constants of its own."""
    prior_: PhasePrior | None
    refiner_: Refiner | None
    _refined: RefinedMap | None
    _closed_form_mean: torch.Tensor | None

    def __init__(
        self,
        rank: int | float = 128,
        *,
        mixing: str = "haar",
        complement: str = "scalar",
        refine: bool = True,
        calibration: str | None = "fitted",
        calibration_steps: int = 0,
        center: bool = False,
        knots: int = 1024,
        slope_limit: float | None = SLOPE_LIMIT,
        prior: PriorOptions | None = None,
        prior_training: TrainingOptions | None = None,
        refinement: RefinementOptions | None = None,
        refinement_training: TrainingOptions | None = None,
        literal: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        self.rank = rank
        self.mixing = mixing
        self.complement = complement
        self.refine = refine
        self.calibration = calibration
        self.calibration_steps = calibration_steps
        self.center = center
        self.knots = knots
        self.slope_limit = slope_limit
        self.prior = prior
        self.prior_training = prior_training
        self.refinement = refinement
        self.refinement_training = refinement_training
        self.literal = literal
        self.seed = seed
        self.device = device
        self.backend = backend

    def _check_options(self) -> None:
        check_rank(self.rank)
        check_mixing(self.mixing)
        if self.complement not in COMPLEMENTS:
            raise InputError(f"complement must be one of {', '.join(COMPLEMENTS)}, got {self.complement!r}")
        if self.calibration not in ("fitted", "corpus", None):
            raise InputError(f"calibration must be 'fitted', 'corpus' or None, got {self.calibration!r}")
        for name, least, most in (("calibration_steps", 0, 100), ("knots", 2, MOST_KNOTS), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
                raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
        for name in ("refine", "center", "literal"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.slope_limit is not None and not self.slope_limit >= 1:
            raise InputError(f"slope_limit must be at least 1, or None for no limit, got {self.slope_limit!r}")
        check_stage_options(self.get_params())

    def fit(
        self,
        source: Embeddings,
        target: Embeddings,
        *,
        checkpoint_dir: str | PathLike[str] | None = None,
        log_dir: str | PathLike[str] | None = None,
        tensorboard: bool = False,
        progress: StageProgress | None = None,
    ) -> AnisoAlign:
        """Fit on two unpaired sets.

        Args:
            source: [N_s, D] embeddings of the source modality: array, tensor, embedding set, or the path of a file or
                folder, which is streamed.
            target: [N_t, D] embeddings of the target modality, any number of rows, in any order.
            checkpoint_dir: folder for ``prior.pt`` and ``refiner.pt``, the state of both stages. A fit of the same data
                with the same options goes on from there and ends as an unbroken one; another one is refused.
            log_dir: folder for ``prior.jsonl`` and ``refiner.jsonl``, the losses of both stages step by step.
            tensorboard: write them for TensorBoard as well, below ``log_dir``.
            progress: called as progress("prior" or "refiner", steps done, steps).

        Returns:
            The aligner itself.

        Raises:
            InputError: widths differ, too few rows for the rank, non-finite values, or an impossible option.
            DataError: a path that holds no usable embeddings, or a checkpoint of another run.
            TrainingError: a loss is not finite.

        Warns:
            UserWarning: rows are not unit vectors, or the refiner has collapsed phases (METHOD D16).
        """
        return self._fit_on(source, target, run=FitRun(checkpoint_dir, log_dir, tensorboard, progress))

    def _fit(self, source: Rows, target: Rows, run: FitRun | None = None) -> tuple[Arrays, dict[str, Any]]:
        slope_limit = None if self.literal else self.slope_limit
        options = FrameOptions(
            self.rank, self.mixing, self._complement(), self.knots, self.seed, self._center(), slope_limit, self.device
        )
        frame, summary = fit_frame(source, target, options)
        check_row_count(frame.rank, source, target)
        parts: Arrays = {}
        refined: RefinedMap | None = None
        if self.refine:
            stages = stage_options(self.get_params(), literal=self.literal, seed=int(self.seed))
            prior, refiner, record = fit_stages(
                source, target, frame, stages, run or FitRun(), device=self.device, backend=self.backend
            )
            parts, refined = {**prior.tensors(), **refiner.tensors()}, RefinedMap(refiner)
            summary |= record
        if self._own_calibration() == "fitted":
            if refined is not None:
                closed, _ = calibrate(frame, source, self._exact(None), iterations=self._steps(), measure=False)
                parts[CLOSED_FORM_MEAN] = _present(closed.output_mean)
            frame, record = calibrate(frame, source, self._exact(refined), iterations=self._steps())
            summary |= record
        return {**frame.tensors(), **parts}, summary

    def transform(self, source: Embeddings, *, calibration: str | None = "auto", refine: bool = True) -> Any:
        """Stand-ins for source rows.

        Args:
            source: [N, D] array, tensor, embedding set or path; N may be 0.
            calibration: ``fitted`` uses constants of the fit, so that each row's result depends on that row alone;
                ``corpus`` first takes the corpus mean from ``source`` itself (METHOD D17); None leaves the last
                calibration off; ``auto`` is what the aligner was made with.
            refine: False leaves the refinement out, as :meth:`closed_form` does; without a refiner it has no effect.

        Returns:
            [N, D] of the same kind: array for an array or a path, tensor for a tensor; same dtype and device.

        Raises:
            NotFittedError: ``fit`` was not called.
            InputError: the width differs from the fitted one (both are named), or the dtype does not fit.
        """
        self._check_fitted()
        if refine or self.refiner_ is None:
            return super().transform(source, calibration=calibration)
        return super(AnisoAlign, self.closed_form()).transform(source, calibration=calibration)

    def closed_form(self) -> AnisoAlign:
        """The initialisation as an aligner of its own: what a fit with ``refine=False`` would have given, to the bit.

        Raises:
            NotFittedError: ``fit`` was not called.
            InputError: this aligner took its mean from a corpus, so that there is none for the closed form.
        """
        self._check_fitted()
        if self.refiner_ is None:
            return self
        frame = self.frame_
        if frame.output_mean is not None and self._closed_form_mean is None:
            raise InputError(
                "this aligner took its mean from a corpus: call closed_form() of the aligner that was fitted, and "
                "calibrate that"
            )
        twin = copy.copy(self)
        twin.refine = False
        twin._install(frame.with_output_mean(self._closed_form_mean).tensors(), self.width_)
        return twin

    def transform_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Stand-ins [n, D] for one batch [n, D] with the fitted constants; dtype and device are kept."""
        self._check_fitted()
        return self._map(self._refined, batch, self.frame_).to(batch.device)

    def transform_into(self, batch: torch.Tensor, out: torch.Tensor) -> None:
        """:meth:`transform_batch` into contiguous memory like that of the batch, and apart from it."""
        self._check_fitted()
        moved = self._moved(batch)
        if moved.device == out.device:
            self._map(self._refined, moved, self.frame_, out)
        else:
            out.copy_(self._map(self._refined, moved, self.frame_))

    def maps_rows_apart(self, batch: torch.Tensor) -> bool:
        """Whether stand-ins of such rows are the same to the bit whatever rows are mapped with them.

        The kernels see to that. The library that multiplies for the reference and for the refiner does not: it chooses
        an order of sums by the number of rows.
        """
        self._check_fitted()
        return self._refined is None and resolve(self.backend, self._moved(batch), self.frame_).name != "reference"

    def _exact(self, refined: RefinedMap | None) -> Callable[[torch.Tensor, Frame], torch.Tensor]:
        """Rows to e, on the CPU: what a calibration averages."""
        return lambda batch, frame: self._map(refined, batch, frame).cpu()

    def _moved(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self.device) if self.device is not None else batch

    def _map(
        self, refined: RefinedMap | None, batch: torch.Tensor, frame: Frame, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        moved = self._moved(batch)
        if refined is None:
            return correct(moved, frame, backend=self.backend, out=out)
        return refined(moved, frame, backend=self.backend, out=out)

    @property
    def corpus_passes(self) -> int:
        return 1 + self._steps()

    def _corpus_sums(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        moved = self._moved(batch)
        if number == 0 and self._refined is None:
            return correct_sums(moved, self.frame_, backend=self.backend).cpu()
        working = moved.to(torch.float64 if batch.dtype == torch.float64 else torch.float32)
        frame = self._bare if number == 0 else self.frame_
        return self._map(self._refined, working, frame).sum(dim=0, dtype=torch.float64).cpu()

    def _corpus_arrays(self, mean: torch.Tensor, number: int) -> Arrays:
        frame = self.frame_
        if number > 0:
            mean = _present(frame.output_mean) + (mean - frame.target_mean)
        return frame.with_output_mean(mean).tensors()

    def _uncalibrated(self) -> AnisoAlign:
        twin = copy.copy(self)
        twin._pin(None)
        twin.frame_ = self._bare
        return twin

    def _pin(self, calibration: str | None) -> None:
        """Spell out what ``literal`` stands for, and set the calibration that the frame now holds.

        The refiner holds its own order of projection and tanh.
        """
        self.complement, self.center, self.calibration_steps = self._complement(), self._center(), self._steps()
        self.calibration, self.literal = calibration, False
        self._closed_form_mean = None

    def _check_arrays(self, arrays: Arrays) -> None:
        frame = self._frame(arrays).validate()
        parts = sorted(name for name in arrays if name.startswith(self.part_prefixes))
        if not self.refine:
            if parts:
                raise InputError(f"refine is False, but {parts[0]} belongs to a refined aligner")
            return
        if not parts:
            raise InputError("refine is True, but there are no arrays of a prior and a refiner: fit the aligner again")
        prior = PhasePrior.from_tensors(arrays)
        if prior.phases != frame.blocks:
            raise InputError(f"the prior has {prior.phases} phases, the frame {frame.blocks} blocks")
        Refiner.from_tensors(arrays, blocks=frame.blocks, width=frame.width)
        for name in parts:
            if name.startswith("closed_form."):
                _check_closed_form(name, arrays[name], frame.width)

    def _frame(self, arrays: Arrays) -> Frame:
        own = {name: value for name, value in arrays.items() if name in TENSOR_FIELDS}
        return Frame.from_tensors(own, complement=self._complement(), center=self._center())

    def _complement(self) -> str:
        return "diagonal" if self.literal else self.complement

    def _center(self) -> bool:
        return self.center and not self.literal

    def _steps(self) -> int:
        return 0 if self.literal else int(self.calibration_steps)

    def _own_calibration(self) -> str | None:
        return "corpus" if self.literal else self.calibration

    def _install(self, arrays: Arrays, width: int) -> None:
        self.frame_ = frame = self._frame(arrays)
        self._bare = frame.with_output_mean(None)
        self.width_ = self.n_features_in_ = width
        refined = any(name.startswith("refiner.") for name in arrays)
        self.prior_ = PhasePrior.from_tensors(arrays) if refined else None
        self.refiner_ = Refiner.from_tensors(arrays, blocks=frame.blocks, width=width) if refined else None
        self._refined = None if self.refiner_ is None else RefinedMap(self.refiner_)
        self._closed_form_mean = arrays.get(CLOSED_FORM_MEAN)

    def _arrays(self) -> Arrays:
        arrays = self.frame_.tensors()
        if self.prior_ is not None and self.refiner_ is not None:
            arrays |= {**self.prior_.tensors(), **self.refiner_.tensors()}
        if self._closed_form_mean is not None:
            arrays[CLOSED_FORM_MEAN] = self._closed_form_mean
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "frame_" in state:
            # Constants that kernels keep with a frame are derived, so a pickle carries a frame without them, and the
            # refiner without its folded weights.
            frame = self.frame_
            state["frame_"] = Frame.from_tensors(frame.tensors(), complement=frame.complement, center=frame.center)
            state["_bare"] = state["frame_"].with_output_mean(None)
            state["_refined"] = None if self.refiner_ is None else RefinedMap(self.refiner_)
        return state


def _present(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None  # a calibration has set it
    return value


def _check_closed_form(name: str, value: torch.Tensor, width: int) -> None:
    if name != CLOSED_FORM_MEAN:
        raise InputError(f"unknown array {name}")
    if value.dtype != torch.float64 or tuple(value.shape) != (width,) or not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} must be finite float64 [{width}], got {value.dtype} {list(value.shape)}")
