"""What the kernels read: constants that follow from the frame alone, folded once so that no row pays for them.

With y~ = y - m_s, c_t = Q^T y~ and the map c_t + Q^T m_t -> c^, every complement has the form

    w = W_out k + scale * y + offset                 (w is e' before its normalisation)

=================== ===================== ============== ==================
complement          W_in^T y + its bias   W_out          k
=================== ===================== ============== ==================
scalar              c_t                   Q              c^ - s c_t
diagonal            c_t                   [Q, -D_V Q]    [c^, c_t]
diagonal_projected  [c_t, p]              [Q, -D_V Q]    [c^ - p, c_t]
=================== ===================== ============== ==================

with p = ((I - QQ^T) D_V Q)^T y~ and offset = m_t,V - scale * m_s. A centred frame maps c_t itself, without Q^T m_t,
and its offset has all of m_t (METHOD D4). The recentring is a bias of the first product and an
offset of the last sum; ``encode`` uses the same operands with c^ = 0.

What folding costs: a coordinate of c_t is rounded relative to |W_in^T y| + |W_in^T m_s| instead of to itself. For unit
rows that is at most eps (1 + |m_s|) an element before the sum, and a radius map enlarges it by its slope, which a fit
limits (docs/method_choices.md has the worst rows of real data in float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aniso_ext.ops.frame import Frame

BUCKETS = 2048  # a power of two: the scale of a bucket is then the same however a division is rounded


@dataclass(frozen=True, eq=False)
class Operands:
    """Folded constants: output_weight and basis in the dtype of the rebuilding products, the rest in that of the sums.

    The projection always has the dtype of the sums: a steep piece of a radius map enlarges the rounding of its input.

    ============================ ========================= ===========================================================
    input_weight                 [R_in, D]                 W_in^T
    input_bias                   [R_in]                    -W_in^T m_s
    target_coordinates           [R]                       Q^T m_t, zero in a centred frame
    segments                     [M, K + 1, 3]             the radius map in pieces: start, value at start, slope
    buckets                      [M, BUCKETS] int16        knots below each bucket of radii, see :func:`knot_buckets`
    windows                      [M] int32                 most knots that one bucket holds
    output_weight                [D, R_out]                W_out
    scale, offset                [1 | D], [D]              see the module's first lines
    basis                        [D, R]                    Q
    shift                        [D] or None               m_t - m_hat, the calibration
    ============================ ========================= ===========================================================
    """

    input_weight: torch.Tensor
    input_bias: torch.Tensor
    target_coordinates: torch.Tensor
    segments: torch.Tensor
    buckets: torch.Tensor
    windows: torch.Tensor
    output_weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    basis: torch.Tensor
    shift: torch.Tensor | None

    def initialisation(self) -> tuple[torch.Tensor, ...]:
        """The arguments that ``correct`` and ``encode`` share, in schema order."""
        return (
            self.input_weight,
            self.input_bias,
            self.target_coordinates,
            self.segments,
            self.buckets,
            self.windows,
            self.output_weight,
            self.scale,
            self.offset,
        )


def radius_segments(source_knots: torch.Tensor, target_knots: torch.Tensor) -> torch.Tensor:
    """Radius maps [M, K] as K + 1 linear pieces, [M, K + 1, 3]: T(rho) = value + (rho - start) * slope.

    The first piece starts at 0 and the last at the last knot; both keep the ratio (METHOD D9). Of pieces that start
    together the last one counts.
    """
    ratio = target_knots / source_knots
    width, rise = source_knots.diff(dim=1), target_knots.diff(dim=1)
    inner = torch.where(width > 0, rise / torch.where(width > 0, width, 1), 0)
    zero = torch.zeros_like(source_knots[:, :1])
    start = torch.cat((zero, source_knots), dim=1)
    value = torch.cat((zero, target_knots), dim=1)
    slope = torch.cat((ratio[:, :1], inner, ratio[:, -1:]), dim=1)
    return torch.stack((start, value, slope), dim=2)


def is_orthonormal(basis: torch.Tensor, rounding: float) -> bool:
    """Whether Q^T Q = I for a basis [D, R] whose entries were rounded, so that |Q k|^2 may be taken for k.k.

    That leaves E = Q^T Q - I out, k.E k, at most |E| |k|^2. For a rounded orthonormal basis |E| is about one rounding,
    and k.E k smaller by the root of R; of one that came from a coarser format |E| is larger.
    """
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    return float(torch.linalg.matrix_norm(basis.T @ basis - identity, 2)) <= 4 * rounding


def knot_buckets(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A coarse index of the knots, so that a radius searches a few of them instead of all K.

    Radii fall in equal buckets, ``min(trunc(rho * (BUCKETS / last knot)), BUCKETS - 1)``. That map never decreases,
    also in rounded arithmetic, so the knots at or below a radius of bucket g are the ``buckets[k, g]`` knots of lower
    buckets and at most ``windows[k]`` knots from there on. Computed in the dtype of the segments: kernels must round
    alike.
    """
    knots = segments[:, 1:, 0].contiguous()
    scale = BUCKETS / knots[:, -1:]
    of_knot = (knots * scale).to(torch.int32).clamp_max(BUCKETS - 1)
    every = torch.arange(BUCKETS, dtype=torch.int32, device=knots.device).expand(len(knots), -1).contiguous()
    below = torch.searchsorted(of_knot, every)
    windows = (torch.searchsorted(of_knot, every, right=True) - below).amax(dim=1, keepdim=True)
    # the window must not reach past the last knot; lower knots that it then covers are below the radius anyway
    below = torch.minimum(below, knots.shape[1] - windows)
    return below.to(torch.int16), windows.flatten().to(torch.int32)


def fold(frame: Frame, product: torch.dtype, working: torch.dtype, device: torch.device) -> Operands:
    """Fold a frame in float64, then round once: what rebuilds to ``product``, the rest to ``working``."""
    exact = frame.to(device=device, dtype=torch.float64)
    basis, scale = exact.basis, exact.complement_scale
    target_coordinates = exact.target_mean @ basis * (not frame.center)
    offset = exact.target_mean - basis @ target_coordinates - scale * exact.source_mean
    input_weight, output_weight = basis.T, basis
    if frame.complement != "scalar":
        scaled_basis = scale[:, None] * basis
        output_weight = torch.cat((basis, -scaled_basis), dim=1)
        if frame.complement == "diagonal_projected":
            leak = scaled_basis - basis @ (basis.T @ scaled_basis)
            input_weight = torch.cat((basis, leak), dim=1).T

    def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return value.to(dtype).contiguous()

    segments = rounded(radius_segments(exact.radius_source_knots, exact.radius_target_knots), working)
    buckets, windows = knot_buckets(segments)
    return Operands(
        input_weight=rounded(input_weight, working),
        input_bias=rounded(-(input_weight @ exact.source_mean), working),
        target_coordinates=rounded(target_coordinates, working),
        segments=segments,
        buckets=buckets,
        windows=windows,
        output_weight=rounded(output_weight, product),
        scale=rounded(scale, working),
        offset=rounded(offset, working),
        basis=rounded(basis, product),
        shift=None if exact.output_mean is None else rounded(exact.target_mean - exact.output_mean, working),
    )


def operands(frame: Frame, product: torch.dtype, working: torch.dtype, device: torch.device) -> Operands:
    """Operands of a frame, folded on first use and kept with it."""
    key = (product, working, str(device))
    frame._prepare(*key)
    return frame._operands[key]
