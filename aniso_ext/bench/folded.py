"""Stock PyTorch with the kernels' algebra: the hardest fair comparison, above all under torch.compile.

The fewest D x R products, everything that depends on the frame alone folded beforehand (the recentring too: no centred
copy of the rows), one pass of elementwise operations in the dtype of the rows, no atan2.
"""

from __future__ import annotations

import math

import torch

from aniso_ext.errors import InputError
from aniso_ext.ops import Frame


class FoldedForm:
    """The operations of a frame with the ``scalar`` or ``diagonal`` complement, for rows of one dtype and device."""

    def __init__(self, frame: Frame, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        if frame.complement == "diagonal_projected":
            raise InputError("the folded form is written for the scalar and the diagonal complement")
        basis, scale = frame.basis, frame.complement_scale
        target_coordinates = frame.target_mean @ basis * (not frame.center)
        self.scalar = frame.complement == "scalar"
        self.calibrated = frame.output_mean is not None
        output_mean = frame.target_mean if frame.output_mean is None else frame.output_mean
        source, target = frame.radius_source_knots, frame.radius_target_knots

        def constant(value: torch.Tensor) -> torch.Tensor:
            return value.to(device=device, dtype=dtype).contiguous()

        self.basis, self.input_bias = constant(basis), constant(-(frame.source_mean @ basis))
        self.target_coordinates = constant(target_coordinates)
        self.scale = constant(scale)
        self.offset = constant(frame.target_mean - basis @ target_coordinates - scale * frame.source_mean)
        self.output_weight = constant(basis if self.scalar else torch.cat((basis, -scale[:, None] * basis), dim=1))
        self.shift = constant(frame.target_mean - output_mean)
        self.source, self.target = constant(source), constant(target)
        self.below = constant(target[:, 0] / source[:, 0])
        self.above = constant(target[:, -1] / source[:, -1])
        self.blocks = torch.arange(frame.blocks, device=device)

    def radius_map(self, radius: torch.Tensor) -> torch.Tensor:
        last = self.source.shape[1] - 1
        index = torch.searchsorted(self.source, radius.detach().T.contiguous(), right=True).T
        lower = (index - 1).clamp(0, last - 1)
        s0, s1 = self.source[self.blocks, lower], self.source[self.blocks, lower + 1]
        t0, t1 = self.target[self.blocks, lower], self.target[self.blocks, lower + 1]
        inside = t0 + (radius - s0) * ((t1 - t0) / (s1 - s0).clamp_min(1e-12))
        return torch.where(index == 0, radius * self.below, torch.where(index > last, radius * self.above, inside))

    def uncalibrated(self, y: torch.Tensor) -> torch.Tensor:
        from_source = torch.addmm(self.input_bias, y, self.basis)
        coordinates = (from_source + self.target_coordinates).unflatten(1, (-1, 2))
        radius = (coordinates.square().sum(-1) + 1e-12).sqrt()
        mapped = (coordinates * (self.radius_map(radius) / radius)[..., None]).flatten(1)
        coefficients = mapped - self.scale * from_source if self.scalar else torch.cat((mapped, from_source), dim=1)
        rows = coefficients @ self.output_weight.T + self.scale * y + self.offset
        return torch.nn.functional.normalize(rows, dim=1)

    def calibrate(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows + self.shift, dim=1) if self.calibrated else rows

    def correct(self, y: torch.Tensor) -> torch.Tensor:
        return self.calibrate(self.uncalibrated(y))

    def correct_sums(self, y: torch.Tensor) -> torch.Tensor:
        return self.uncalibrated(y).sum(dim=0, dtype=torch.float32)

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        from_source = torch.addmm(self.input_bias, y, self.basis)
        coordinates = (from_source + self.target_coordinates).unflatten(1, (-1, 2))
        radius = (coordinates.square().sum(-1) + 1e-12).sqrt()
        cos, sin = (coordinates / radius[..., None]).unbind(-1)
        v0 = self.scale * (y - from_source @ self.basis.T) + self.offset
        return torch.cat((sin, cos, self.radius_map(radius).log(), v0), dim=1)

    def decode(self, state: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        width, rank = self.basis.shape
        blocks = rank // 2
        sin, cos, log_rho, v0 = state.split((blocks, blocks, blocks, width), dim=1)
        turn, stretch, move = deltas.split((blocks, blocks, width), dim=1)
        angle = 0.1 * turn.tanh()
        rho = (log_rho + 0.1 * stretch.tanh()).exp()
        turned = torch.stack((cos * angle.cos() - sin * angle.sin(), sin * angle.cos() + cos * angle.sin()), dim=-1)
        step = 0.1 / math.sqrt(width) * move.tanh()
        coefficients = (rho[..., None] * turned).flatten(1) - step @ self.basis
        rows = torch.nn.functional.normalize(coefficients @ self.basis.T + v0 + step, dim=1)
        return self.calibrate(rows)
