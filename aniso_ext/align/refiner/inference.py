"""The refined map of rows: one encode, the refiner's products, one decode (METHOD section 4)."""

from __future__ import annotations

import torch

from aniso_ext.align.refiner.network import FoldedRefiner, Refiner
from aniso_ext.ops import Frame, decode, encode

ROWS_ON_CPU = 2048
"""Rows at a time on the CPU: the states and hidden layers of one batch stay within a few tens of megabytes."""


class RefinedMap:
    """Stand-ins of rows under a trained refiner; its folded weights are kept for each dtype and device they met.

    float64 rows are computed in float64 and all others in float32; half precision stays what it is on CUDA alone, where
    the products gain by it.

    Args:
        refiner: trained under the basis of the frames that the map is called with.
    """

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self._folded: dict[tuple[torch.dtype, torch.device], FoldedRefiner] = {}

    def __call__(
        self, rows: torch.Tensor, frame: Frame, *, backend: str = "auto", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unit rows [n, D] for rows [n, D], of the same dtype and device, in ``out`` or in new memory.

        They are calibrated if the frame is.
        """
        size = ROWS_ON_CPU if rows.device.type == "cpu" else max(1, len(rows))
        if out is None and len(rows) <= size:
            return self._refine(rows, frame, backend)
        result = torch.empty_like(rows, memory_format=torch.contiguous_format) if out is None else out
        for part, place in zip(rows.split(size), result.split(size), strict=True):
            place.copy_(self._refine(part, frame, backend))
        return result

    @torch.no_grad()
    def _refine(self, rows: torch.Tensor, frame: Frame, backend: str) -> torch.Tensor:
        state, deltas = self.update(rows, frame, backend=backend)
        bounds = self.refiner.bounds
        return decode(
            state,
            deltas,
            frame,
            a_theta=bounds.a_theta,
            a_rho=bounds.a_rho,
            a_v=bounds.a_v,
            literal=self.refiner.literal,
            projected=self.refiner.literal,
            backend=backend,
        ).to(rows.dtype)

    @torch.no_grad()
    def update(self, rows: torch.Tensor, frame: Frame, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
        """State [n, 3M + D] and deltas [n, 2M + D] of rows [n, D], in the dtype of the computation."""
        working = rows.dtype
        if working != torch.float64 and rows.device.type == "cpu":
            working = torch.float32
        state = encode(rows.to(working), frame, backend=backend)
        key = (working, state.device)
        if key not in self._folded:
            self._folded[key] = self.refiner.fold(frame.basis, dtype=working).to(state.device)
        return state, self._folded[key](state)
