"""Public operations: check the arguments, choose a backend, run it."""

from __future__ import annotations

import math

import torch

from aniso_ext.errors import InputError
from aniso_ext.ops import backends
from aniso_ext.ops.frame import Frame

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def correct(y: torch.Tensor, frame: Frame, *, backend: str = "auto", out: torch.Tensor | None = None) -> torch.Tensor:
    """Closed-form stand-ins for source embeddings: project, polar, radius map, rebuild, renormalise, calibrate.

    e' = Norm(Q c(T(rho), theta) + v0), e = Norm(e' - m_hat + m_t) when the frame is calibrated (METHOD section 4).

    Args:
        y: source embeddings, [N, D], float16, bfloat16, float32 or float64, any strides. N may be 0.
        frame: fitted constants for width D.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.
        out: contiguous memory for the result, of shape, dtype and device of ``y`` and apart from it; without gradients.
            The backend ``cpu`` writes the result there, others copy it.

    Returns:
        Unit rows [N, D], dtype and device of ``y``; ``out`` if it was given. Sums are float32 (float64 for float64
        input). A non-finite row stays non-finite and touches no other row. Differentiable in ``y``.

    Raises:
        InputError: shape, width, dtype or device do not fit.
        BackendUnavailableError: the named backend is not there.

    Example:
        >>> import torch, aniso_ext as aniso
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = aniso.Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> aniso.ops.correct(torch.tensor([[0.6, 0.0, 0.8, 0.0]]), frame)
        tensor([[0.6000, 0.0000, 0.8000, 0.0000]])
    """
    _check("y", y, frame.width, "D")
    chosen = backends.resolve(backend, y, frame, "correct")
    if out is None:
        return chosen.correct(y, frame)
    _check_out(out, y)
    if chosen.correct_into is None:
        return out.copy_(chosen.correct(y, frame))
    chosen.correct_into(y, frame, out)
    return out


def correct_sums(y: torch.Tensor, frame: Frame, *, backend: str = "auto") -> torch.Tensor:
    """Column sums of e', the uncalibrated stand-ins: the first pass of a corpus calibration (METHOD D17).

    sum_i e'_i with e' = Norm(Q c(T(rho), theta) + v0). Rows are read once and nothing of their size is written; the
    sums of several batches add up, and over N they are m_hat. ``frame.output_mean`` plays no part.

    Args:
        y: source embeddings, [N, D], as for :func:`correct`.
        frame: fitted constants for width D.
        backend: as for :func:`correct`.

    Returns:
        float64 [D] on the device of ``y``; zeros for N = 0. A non-finite row makes the sums non-finite.
        Not differentiable.

    Raises:
        InputError, BackendUnavailableError: as for :func:`correct`.

    Example:
        >>> import torch, aniso_ext as aniso
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = aniso.Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> aniso.ops.correct_sums(torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]]), frame)[2:]
        tensor([1., 1.], dtype=torch.float64)
    """
    _check("y", y, frame.width, "D")
    return backends.resolve(backend, y, frame, "correct_sums").correct_sums(y.detach(), frame)


def encode(y: torch.Tensor, frame: Frame, *, backend: str = "auto") -> torch.Tensor:
    """Refiner input: the closed-form initialisation in polar form, before it is rebuilt (METHOD section 4).

    Args:
        y: source embeddings, [N, D], as for :func:`correct`.
        frame: fitted constants for width D.
        backend: as for :func:`correct`.

    Returns:
        [N, 3M + D] = [sin theta0; cos theta0; log rho0; v0], dtype and device of ``y``. Differentiable in ``y``.

    Raises:
        InputError, BackendUnavailableError: as for :func:`correct`.

    Example:
        >>> import torch, aniso_ext as aniso
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = aniso.Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> aniso.ops.encode(torch.tensor([[1.0, 0.0, 0.5, 0.0]]), frame)
        tensor([[0.0000, 1.0000, 0.0000, 0.0000, 0.0000, 0.5000, 0.0000]])
    """
    _check("y", y, frame.width, "D")
    return backends.resolve(backend, y, frame, "encode").encode(y, frame)


def decode(
    state: torch.Tensor,
    deltas: torch.Tensor,
    frame: Frame,
    *,
    a_theta: float = 0.1,
    a_rho: float = 0.1,
    a_v: float | None = None,
    literal: bool = False,
    projected: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Bounded update of encoded rows, then rebuild, renormalise and calibrate (METHOD section 4, D11, D12).

    theta^ = theta0 + a_theta tanh(dtheta), rho^ = rho0 exp(a_rho tanh(drho)),
    v^ = v0 + (I - QQ^T)(a_v tanh(dv)); ``literal`` projects before the tanh: v0 + a_v tanh((I - QQ^T) dv).

    Args:
        state: output of :func:`encode`, [N, 3M + D].
        deltas: [dtheta; drho; dv], [N, 2M + D], dtype and device of ``state``.
        frame: fitted constants for width D.
        a_theta: largest turn of a phase, radians.
        a_rho: largest change of a log radius.
        a_v: largest change of a coordinate of V; default 0.1/sqrt(D).
        literal: the order of tanh and projection as printed in the paper.
        projected: with ``literal``, dv lies in V already, and is not projected again: (I - QQ^T) was folded into the
            linear layer that dv comes from (METHOD D13).
        backend: as for :func:`correct`.

    Returns:
        Unit rows [N, D], dtype and device of ``state``. Differentiable in ``state`` and ``deltas``.

    Raises:
        InputError: shapes, widths, dtypes or devices do not fit, a bound is negative or not finite, or ``projected``
            comes without ``literal``.
        BackendUnavailableError: the named backend is not there.

    Example:
        >>> import torch, aniso_ext as aniso
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = aniso.Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> state = aniso.ops.encode(torch.tensor([[0.6, 0.0, 0.8, 0.0]]), frame)
        >>> aniso.ops.decode(state, torch.zeros(1, 6), frame)
        tensor([[0.6000, 0.0000, 0.8000, 0.0000]])
    """
    blocks, width = frame.blocks, frame.width
    _check("state", state, 3 * blocks + width, "3M + D")
    _check("deltas", deltas, 2 * blocks + width, "2M + D")
    if len(state) != len(deltas):
        raise InputError(f"state has {len(state)} rows and deltas {len(deltas)}: pass one row of deltas for each state")
    if state.dtype != deltas.dtype or state.device != deltas.device:
        raise InputError(
            f"state is {state.dtype} on {state.device}, deltas {deltas.dtype} on {deltas.device}: "
            "use one dtype and device"
        )
    a_v = 0.1 / math.sqrt(width) if a_v is None else a_v
    for name, bound in (("a_theta", a_theta), ("a_rho", a_rho), ("a_v", a_v)):
        if not (math.isfinite(bound) and bound >= 0):
            raise InputError(f"{name} must be finite and not negative, got {bound}")
    if projected and not literal:
        raise InputError("projected=True goes with literal=True: by default the projection comes after the tanh")
    chosen = backends.resolve(backend, state, frame, "decode")
    bounds = {"a_theta": a_theta, "a_rho": a_rho, "a_v": a_v}
    return chosen.decode(state, deltas, frame, **bounds, literal=literal, projected=projected)


def _check(name: str, rows: torch.Tensor, width: int, letters: str) -> None:
    if not isinstance(rows, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(rows).__name__}: wrap arrays with torch.from_numpy")
    if rows.dim() != 2:
        raise InputError(f"{name} must be [N, {letters}], got shape {list(rows.shape)}")
    if rows.shape[1] != width:
        raise InputError(f"{name} has width {rows.shape[1]}, but this frame needs {letters} = {width}")
    if rows.dtype not in FLOATING:
        raise InputError(f"{name} is {rows.dtype}: pass float16, bfloat16, float32 or float64")


def _check_out(out: torch.Tensor, y: torch.Tensor) -> None:
    expected, given = ((tuple(x.shape), x.dtype, x.device) for x in (y, out))
    if given != expected or not out.is_contiguous():
        raise InputError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, y is {y.dtype} {list(y.shape)} on {y.device}: pass "
            "contiguous memory like y"
        )
    if torch.is_grad_enabled() and (y.requires_grad or out.requires_grad):
        raise InputError("out takes no part in gradients: leave it out, or call correct under torch.no_grad()")
