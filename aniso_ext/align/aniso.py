"""AnisoAlign: the closed-form initialisation of METHOD section 4 in a fitted frame."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import torch

from aniso_ext.align.base import Aligner, Arrays, Fields
from aniso_ext.align.fitting import SLOPE_LIMIT, FrameOptions, calibrate, check_rank, fit_frame
from aniso_ext.align.mixing import check_mixing
from aniso_ext.align.registry import register
from aniso_ext.align.rows import Rows
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame, correct
from aniso_ext.ops.frame import COMPLEMENTS, MOST_KNOTS


@register("anisoalign")
class AnisoAlign(Aligner):
    """Anisotropic alignment: radii of a dominant subspace mapped block by block, its complement rescaled.

    With y~ = y - m_s, Q [D, R] the mixed top eigenvectors of S_source + S_target and V their complement:

        c = Q^T (y~ + m_t) in polar blocks (rho_k, theta_k);  c^ has radii T_k(rho_k) and the same phases
        e' = Norm(Q c^ + m_t,V + D_V y~_V);  e = Norm(e' - m_hat + m_t)        (METHOD section 4, paper eq. (7))

    The frame is fitted in two streaming passes over each side (moments, radii); the calibration takes one pass over the
    source, one per fixed-point step and one that measures what is left. Everything is fitted in float64 and is a
    function of the data and ``seed``. A transformed row depends on that row alone, to the rounding of the matrix
    products, unless the calibration is ``corpus``.

    Args:
        rank: R, even, or a float in (0, 1]: the share of the energy of S_J to hold (METHOD D2).
        mixing: what shares a block (METHOD D3): ``haar`` (a random rotation from ``seed``, chosen in
            docs/method_choices.md), ``balanced`` (strong directions with weak ones) or ``pca_adjacent``.
            ``phase_stable`` is not in this version.
        complement: ``scalar``, ``diagonal`` (the paper's) or ``diagonal_projected`` with ratios clamped to [1/4, 4]
            (METHOD D10).
        refine: the Stage II refiner. It is not in this version: True, the default, is an error at ``fit``.
        calibration: ``fitted`` keeps m_hat of the fitted source in the frame; ``corpus`` takes it from each corpus that
            is transformed (two passes); None leaves the calibration off (METHOD D17).
        calibration_steps: fixed-point steps that drive |mean(e) - m_t| down.
        center: polar coordinates of centred coordinates; the paper's are uncentred (METHOD D4).
        knots: K of the radius maps (METHOD D9).
        slope_limit: steepest slope of a radius map, in units of its block's overall ratio of target to source radii;
            None allows any. Where copies among the source rows make T_k jump, the limit keeps a rounding error of a
            radius a rounding error of the result (docs/method_choices.md).
        literal: the paper's printed form of every decision: uncentred, ``diagonal`` complement, ``corpus`` calibration
            without steps and no slope limit, whatever those options say.
        seed: of the ``haar`` mixing.
        device: where rows are transformed; None leaves them where they are.
        backend: of :func:`aniso_ext.ops.correct`.

    Attributes:
        frame_: the fitted :class:`aniso_ext.Frame`, float64 on the CPU.
        summary_: rank, coverage (share of S_J, of S_source, of S_target), ridge (lambda of METHOD D1, for the record:
            it moves no eigenvector), centroid_gap, complement_scale, calibration_error_before and _after.

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
    transform_options = ("refine", "complement", "center", "calibration", "calibration_steps", "literal")
    runtime_options = ("device", "backend")

    baseline = False
    frame_: Frame

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
        if self.refine:
            raise InputError(
                "refine=True (the default) asks for the Stage II refiner, which this version does not have: "
                "pass refine=False (--no-refine) for the closed-form alignment"
            )

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        slope_limit = None if self.literal else self.slope_limit
        options = FrameOptions(
            self.rank, self.mixing, self._complement(), self.knots, self.seed, self._center(), slope_limit
        )
        frame, summary = fit_frame(source, target, options)
        if self._own_calibration() == "fitted":
            frame, record = calibrate(frame, source, self._exact, iterations=self._steps())
            summary |= record
        return frame.tensors(), summary

    def _exact(self, batch: torch.Tensor, frame: Frame) -> torch.Tensor:
        moved = batch.to(self.device) if self.device is not None else batch
        return correct(moved, frame, backend=self.backend).cpu()

    def transform_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Stand-ins [n, D] for one batch [n, D] with the fitted frame; dtype and device are kept."""
        self._check_fitted()
        moved = batch.to(self.device) if self.device is not None else batch
        return correct(moved, self.frame_, backend=self.backend).to(batch.device)

    def _corpus_arrays(self, source: Rows) -> Arrays:
        frame, _ = calibrate(self.frame_, source, self._exact, iterations=self._steps(), measure=False)
        return frame.tensors()

    def _uncalibrated(self) -> AnisoAlign:
        twin = copy.copy(self)
        twin._pin(None)
        twin.frame_ = self.frame_.with_output_mean(None)
        return twin

    def _pin(self, calibration: str | None) -> None:
        """Spell out what ``literal`` stands for, and set the calibration that the frame now holds."""
        self.complement, self.center, self.calibration_steps = self._complement(), self._center(), self._steps()
        self.calibration, self.literal = calibration, False

    def _check_arrays(self, arrays: Arrays) -> None:
        self._frame(arrays).validate()

    def _frame(self, arrays: Arrays) -> Frame:
        return Frame.from_tensors(arrays, complement=self._complement(), center=self._center())

    def _complement(self) -> str:
        return "diagonal" if self.literal else self.complement

    def _center(self) -> bool:
        return self.center and not self.literal

    def _steps(self) -> int:
        return 0 if self.literal else int(self.calibration_steps)

    def _own_calibration(self) -> str | None:
        return "corpus" if self.literal else self.calibration

    def _install(self, arrays: Arrays, width: int) -> None:
        self.frame_ = self._frame(arrays)
        self.width_ = self.n_features_in_ = width

    def _arrays(self) -> Arrays:
        return self.frame_.tensors()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "frame_" in state:
            # Constants that kernels keep with a frame are derived, so a pickle carries a frame without them.
            frame = self.frame_
            state["frame_"] = Frame.from_tensors(frame.tensors(), complement=frame.complement, center=frame.center)
        return state
