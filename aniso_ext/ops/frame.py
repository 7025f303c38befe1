"""The fixed frame: every constant that the closed-form correction reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aniso_ext.errors import InputError
from aniso_ext.ops.tracing import constant_while_tracing

TENSOR_FIELDS = (
    "source_mean",
    "target_mean",
    "basis",
    "radius_source_knots",
    "radius_target_knots",
    "complement_scale",
    "output_mean",
)
MOST_KNOTS = 32767
COMPLEMENTS = ("scalar", "diagonal", "diagonal_projected")
ORTHONORMALITY_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class Frame:
    """Immutable constants of the closed-form correction (METHOD sections 2 and 4).

    Fields (``D`` width, ``R`` rank, ``M = R/2`` blocks, ``K`` knots), all of one floating dtype and device:

    ==================== ======= ==================================================================
    source_mean          [D]     m_s, mean of the source embeddings
    target_mean          [D]     m_t, mean of the target embeddings
    basis                [D, R]  Q with the mixing applied; block k is columns 2k and 2k+1
    radius_source_knots  [M, K]  quantiles of the radii of the recentred source, increasing per block
    radius_target_knots  [M, K]  quantiles of the radii of the target at the same levels
    complement_scale     [1|D]   s_V (scalar) or the diagonal of D_V (METHOD D10)
    output_mean          [D]     m_hat, mean of e' over the corpus; None until calibrated (METHOD D17)
    ==================== ======= ==================================================================

    ``complement`` names how V is rescaled: ``scalar``, ``diagonal`` (paper) or ``diagonal_projected``; ``center`` says
    that the radii are those of centred coordinates, y - m_s instead of y - m_s + m_t (METHOD D4). Tensors are made
    contiguous; shapes and dtypes are checked on construction, values by :meth:`validate`. The tensors must not be
    written to afterwards: constants derived from them are kept with the frame.

    Raises:
        InputError: a shape, dtype, device or option does not fit; the message names the field.

    Example:
        >>> import torch
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> frame.width, frame.rank, frame.blocks, frame.knots
        (4, 2, 1, 8)
    """

    source_mean: torch.Tensor
    target_mean: torch.Tensor
    basis: torch.Tensor
    radius_source_knots: torch.Tensor
    radius_target_knots: torch.Tensor
    complement_scale: torch.Tensor
    output_mean: torch.Tensor | None = None
    complement: str = "scalar"
    center: bool = False
    _operands: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in TENSOR_FIELDS:
            value = getattr(self, name)
            if value is None and name == "output_mean":
                continue
            if not isinstance(value, torch.Tensor):
                raise InputError(f"Frame.{name} must be a torch.Tensor, got {type(value).__name__}")
            object.__setattr__(self, name, _constant(value))
        if self.complement not in COMPLEMENTS:
            raise InputError(f"Frame.complement must be one of {', '.join(COMPLEMENTS)}, got {self.complement!r}")
        if self.basis.dim() != 2:
            raise InputError(f"Frame.basis must be [D, R], got shape {list(self.basis.shape)}")
        if self.radius_source_knots.dim() != 2:
            raise InputError(f"Frame.radius_source_knots must be [M, K], got {list(self.radius_source_knots.shape)}")
        if self.rank < 2 or self.rank % 2 or self.rank > self.width:
            raise InputError(f"the rank must be even, at least 2 and at most the width {self.width}, got {self.rank}")
        if not 2 <= self.knots <= MOST_KNOTS:
            raise InputError(f"a radius map needs 2 to {MOST_KNOTS} knots, got {self.knots}")
        scale_length = 1 if self.complement == "scalar" else self.width
        expected = {
            "source_mean": (self.width,),
            "target_mean": (self.width,),
            "radius_source_knots": (self.blocks, self.knots),
            "radius_target_knots": (self.blocks, self.knots),
            "complement_scale": (scale_length,),
            "output_mean": (self.width,),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"Frame.{name} must have shape {list(shape)}, got {list(value.shape)}")
        for name, value in self.tensors().items():
            if not value.is_floating_point() or value.dtype != self.dtype:
                raise InputError(
                    f"Frame.{name} is {value.dtype}, but the basis is {self.dtype}: use one floating dtype"
                )
            if value.device != self.device:
                raise InputError(f"Frame.{name} is on {value.device}, but the basis is on {self.device}")

    @property
    def width(self) -> int:
        """D, the embedding width."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """R, the rank of the dominant subspace."""
        return self.basis.shape[1]

    @property
    def blocks(self) -> int:
        """M = R/2, the number of two-dimensional blocks."""
        return self.rank // 2

    @property
    def knots(self) -> int:
        """K, the number of knots of each radius map."""
        return self.radius_source_knots.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        return self.basis.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """The named arrays that are present; the keys of ``model.safetensors``."""
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, complement: str = "scalar", center: bool = False
    ) -> Frame:
        """Build a frame from named arrays; a missing or unknown name is an :class:`InputError`."""
        unknown = sorted(set(tensors) - set(TENSOR_FIELDS))
        missing = sorted(set(TENSOR_FIELDS) - {"output_mean"} - set(tensors))
        if unknown or missing:
            raise InputError(
                f"the arrays of a frame do not fit: missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        return cls(**dict(tensors), complement=complement, center=center)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Frame:
        """A frame on another device or in another floating dtype (this one if nothing changes)."""
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        if device == self.device and dtype == self.dtype:
            return self
        moved = {name: value.to(device=device, dtype=dtype) for name, value in self.tensors().items()}
        return Frame.from_tensors(moved, complement=self.complement, center=self.center)

    def with_output_mean(self, output_mean: torch.Tensor | None) -> Frame:
        """The same frame with another calibration mean; None takes the calibration off."""
        return replace(self, output_mean=output_mean)

    def fingerprint(self) -> str:
        """SHA-256 of the content (names, dtypes, shapes, bytes, options): equal frames have equal fingerprints."""
        digest = hashlib.sha256(f"{self.complement}{', centred' if self.center else ''}".encode())
        for name, value in self.tensors().items():
            digest.update(f"{name}:{value.dtype}:{list(value.shape)}".encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @constant_while_tracing  # torch.compile folds while it traces, so that a graph only reads the result
    def _prepare(self, product: torch.dtype, working: torch.dtype, device: str) -> None:
        """Keep the operands for these dtypes and this device in ``_operands``."""
        from aniso_ext.ops.operands import fold

        key = (product, working, device)
        if key not in self._operands:
            # autograd refuses tensors made in inference mode, and the first use may be in it
            with torch.inference_mode(False):
                self._operands[key] = fold(self, product, working, torch.device(device))

    @constant_while_tracing
    def _prepare_triton(self, storage: torch.dtype, precision: str, device: str) -> None:
        """Keep the constants of the Triton kernels for rows of a dtype in ``_operands``."""
        from aniso_ext.ops.triton.constants import fold_constants

        key = ("triton", storage, precision, device)
        if key not in self._operands:
            with torch.inference_mode(False):
                self._operands[key] = fold_constants(self, storage, precision, torch.device(device))

    @constant_while_tracing
    def _prepare_hopper(self, storage: torch.dtype, device: str) -> None:
        """Keep the constants of the Hopper kernels for rows of a dtype in ``_operands``."""
        from aniso_ext.ops.hopper import fold_hopper

        key = ("hopper", storage, device)
        if key not in self._operands:
            with torch.inference_mode(False):
                self._operands[key] = fold_hopper(self, storage, torch.device(device))

    @constant_while_tracing
    def _prepare_hopper_update(self, storage: torch.dtype, device: str) -> None:
        """Keep the basis as the Hopper kernel of ``decode`` reads it in ``_operands``."""
        from aniso_ext.ops.hopper import shuffle

        key = ("hopper update", storage, device)
        if key not in self._operands:
            with torch.inference_mode(False):
                self._operands[key] = shuffle(self.basis.to(device=device, dtype=storage))

    def validate(self) -> Frame:
        """Check the values and return the frame.

        Raises:
            InputError: an array has non-finite values, the basis is not orthonormal, knots decrease or start below
                zero, or a complement scale is negative; the message names the field.
        """
        for name, value in self.tensors().items():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise InputError(f"Frame.{name} has {bad} non-finite values: fit the aligner again")
        basis = self.basis.double()
        identity = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        error = float((basis.T @ basis - identity).abs().max())
        tolerance = ORTHONORMALITY_TOLERANCE[self.dtype]
        if error > tolerance:
            raise InputError(
                f"Frame.basis is not orthonormal: |Q^T Q - I| reaches {error:.2e}, allowed {tolerance:.0e}"
            )
        for name in ("radius_source_knots", "radius_target_knots"):
            value = getattr(self, name)
            decreasing = (value.diff(dim=1) < 0).any(dim=1) | (value[:, 0] < 0)
            if bool(decreasing.any()):
                block = int(decreasing.nonzero()[0])
                raise InputError(f"Frame.{name} must start at 0 or above and never decrease; block {block} does")
        if bool((self.radius_source_knots[:, 0] <= 0).any()):
            raise InputError("Frame.radius_source_knots must be positive: radii are at least sqrt(eps)")
        if bool((self.complement_scale < 0).any()):
            raise InputError("Frame.complement_scale must not be negative")
        return self


def _constant(value: torch.Tensor) -> torch.Tensor:
    """Contiguous, without a gradient, and fit for autograd even when it was made in inference mode."""
    value = value.detach().contiguous()
    if not torch.compiler.is_compiling() and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value
