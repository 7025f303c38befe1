"""The operations as plain PyTorch, step by step: what every other backend is compared with.

Works for any floating dtype and device; half-precision inputs are computed in float32 and rounded once at the end.
Gradients come from autograd and are safe at zero radii (METHOD section 2).
"""

from __future__ import annotations

import torch

from aniso_ext.ops.frame import Frame

RADIUS_EPS = 1e-12
NORM_FLOOR = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a row of this dtype is computed: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def polar(coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radius and direction of each block: rho = sqrt(a^2 + b^2 + eps), (cos, sin) = (a, b)/sqrt(a^2 + b^2).

    ``coordinates`` is [..., R]; three tensors [..., M] come back. At a = b = 0 the phase is 0 and its gradient zero.
    """
    a, b = coordinates[..., 0::2], coordinates[..., 1::2]
    squared = a * a + b * b
    at_origin = squared == 0
    length = torch.where(at_origin, 1, squared).sqrt()
    cos = torch.where(at_origin, 1, a / length)
    sin = torch.where(at_origin, 0, b / length)
    return (squared + RADIUS_EPS).sqrt(), cos, sin


def cartesian(radius: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Block coordinates [..., R] from radii and directions [..., M]: the inverse of :func:`polar`."""
    return torch.stack((radius * cos, radius * sin), dim=-1).flatten(-2)


def radius_map(radius: torch.Tensor, source_knots: torch.Tensor, target_knots: torch.Tensor) -> torch.Tensor:
    """T_k(rho) of METHOD section 4: linear between knots, ratio-preserving outside them (METHOD D9).

    ``radius`` is [N, M], knots are [M, K]; returns [N, M]. Coinciding source knots are a jump to the upper target.
    """
    last = source_knots.shape[1] - 1
    index = torch.searchsorted(source_knots, radius.detach().T.contiguous(), right=True).T - 1
    lower = index.clamp(0, last - 1)
    blocks = torch.arange(radius.shape[1], device=radius.device)
    s0, s1 = source_knots[blocks, lower], source_knots[blocks, lower + 1]
    t0, t1 = target_knots[blocks, lower], target_knots[blocks, lower + 1]
    width = s1 - s0
    slope = torch.where(width > 0, (t1 - t0) / torch.where(width > 0, width, 1), 0)
    inside = t0 + (radius - s0) * slope
    below = radius * (target_knots[:, 0] / source_knots[:, 0])
    above = radius * (target_knots[:, -1] / source_knots[:, -1])
    return torch.where(index < 0, below, torch.where(index >= last, above, inside))


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Each row over its Euclidean norm; a zero row stays zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def calibrate(rows: torch.Tensor, frame: Frame) -> torch.Tensor:
    """e = Norm(e' - m_hat + m_t), or e' itself when the frame has no output mean (METHOD D17)."""
    if frame.output_mean is None:
        return rows
    return normalize(rows - frame.output_mean + frame.target_mean)


def complement(centred: torch.Tensor, frame: Frame) -> torch.Tensor:
    """v0 = m_t,V + D_V (y_V - m_s,V) for rows y - m_s, with the rescaling that the frame names (METHOD D10).

    A centred frame takes the rest of m_t in as well, because its radii left it out (METHOD D4).
    """
    basis = frame.basis
    rescaled = frame.complement_scale * (centred - centred @ basis @ basis.T)
    if frame.complement == "diagonal_projected":
        rescaled = rescaled - rescaled @ basis @ basis.T
    if frame.center:
        return rescaled + frame.target_mean
    return rescaled + (frame.target_mean - frame.target_mean @ basis @ basis.T)


def initialise(y: torch.Tensor, frame: Frame) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rho0, cos theta0, sin theta0, v0): the closed-form initialisation of METHOD section 4."""
    centred = y - frame.source_mean
    recentred = centred if frame.center else centred + frame.target_mean
    radius, cos, sin = polar(recentred @ frame.basis)
    mapped = radius_map(radius, frame.radius_source_knots, frame.radius_target_knots)
    return mapped, cos, sin, complement(centred, frame)


def correct(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Stand-ins e [N, D] for source rows y [N, D]."""
    working = compute_dtype(y.dtype)
    frame = frame.to(dtype=working)
    radius, cos, sin, v0 = initialise(y.to(working), frame)
    rows = normalize(cartesian(radius, cos, sin) @ frame.basis.T + v0)
    return calibrate(rows, frame).to(y.dtype)


def correct_sums(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Column sums [D] of e', float64."""
    rows = y.to(compute_dtype(y.dtype))
    return correct(rows, frame.with_output_mean(None)).sum(dim=0, dtype=torch.float64)


def encode(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Refiner input [sin theta0; cos theta0; log rho0; v0], [N, 3M + D]."""
    working = compute_dtype(y.dtype)
    radius, cos, sin, v0 = initialise(y.to(working), frame.to(dtype=working))
    return torch.cat((sin, cos, radius.log(), v0), dim=-1).to(y.dtype)


def decode(
    state: torch.Tensor,
    deltas: torch.Tensor,
    frame: Frame,
    *,
    a_theta: float,
    a_rho: float,
    a_v: float,
    literal: bool = False,
    projected: bool = False,
) -> torch.Tensor:
    """Bounded update of an encoded row, rebuilt, renormalised and calibrated (METHOD section 4, D11)."""
    working = compute_dtype(state.dtype)
    frame = frame.to(dtype=working)
    blocks, width, basis = frame.blocks, frame.width, frame.basis
    sin, cos, log_radius, v0 = state.to(working).split((blocks, blocks, blocks, width), dim=-1)
    turn, stretch, move = deltas.to(working).split((blocks, blocks, width), dim=-1)
    angle = a_theta * turn.tanh()
    radius = (log_radius + a_rho * stretch.tanh()).exp()
    turned_cos = cos * angle.cos() - sin * angle.sin()
    turned_sin = sin * angle.cos() + cos * angle.sin()
    if literal:
        step = a_v * (move if projected else move - move @ basis @ basis.T).tanh()
    else:
        step = a_v * move.tanh()
        step = step - step @ basis @ basis.T
    rows = normalize(cartesian(radius, turned_cos, turned_sin) @ basis.T + v0 + step)
    return calibrate(rows, frame).to(state.dtype)
