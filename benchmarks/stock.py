"""The closed form in stock PyTorch with the kernels' algebra: the hardest fair comparison.

Two D x R products for the scalar complement, everything that depends on the frame alone folded beforehand, one pass of
elementwise operations in the dtype of the rows, no atan2.
"""

from __future__ import annotations

import torch

from aniso_ext import Frame


class FoldedClosedForm(torch.nn.Module):
    """``aniso_ext.ops.correct`` for a calibrated frame with the scalar complement."""

    def __init__(self, frame: Frame, dtype: torch.dtype) -> None:
        super().__init__()
        basis, scale = frame.basis, frame.complement_scale
        offset = frame.target_mean - basis @ (frame.target_mean @ basis)
        constants = {
            "source_mean": frame.source_mean,
            "basis": basis,
            "target_coordinates": frame.target_mean @ basis,
            "scale": scale,
            "offset": offset,
            "shift": frame.target_mean - frame.output_mean,
            "source": frame.radius_source_knots,
            "target": frame.radius_target_knots,
            "below": frame.radius_target_knots[:, 0] / frame.radius_source_knots[:, 0],
            "above": frame.radius_target_knots[:, -1] / frame.radius_source_knots[:, -1],
        }
        for name, value in constants.items():
            self.register_buffer(name, value.to(dtype))
        self.register_buffer("blocks", torch.arange(frame.blocks))

    def radius_map(self, radius: torch.Tensor) -> torch.Tensor:
        last = self.source.shape[1] - 1
        index = torch.searchsorted(self.source, radius.T.contiguous(), right=True).T
        lower = (index - 1).clamp(0, last - 1)
        s0, s1 = self.source[self.blocks, lower], self.source[self.blocks, lower + 1]
        t0, t1 = self.target[self.blocks, lower], self.target[self.blocks, lower + 1]
        inside = t0 + (radius - s0) * ((t1 - t0) / (s1 - s0).clamp_min(1e-12))
        return torch.where(index == 0, radius * self.below, torch.where(index > last, radius * self.above, inside))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        centred = y - self.source_mean
        from_source = centred @ self.basis
        coordinates = (from_source + self.target_coordinates).unflatten(1, (-1, 2))
        radius = (coordinates.square().sum(-1) + 1e-12).sqrt()
        mapped = (coordinates * (self.radius_map(radius) / radius)[..., None]).flatten(1)
        rows = (mapped - self.scale * from_source) @ self.basis.T + self.scale * centred + self.offset
        rows = torch.nn.functional.normalize(rows, dim=1)
        return torch.nn.functional.normalize(rows + self.shift, dim=1)
