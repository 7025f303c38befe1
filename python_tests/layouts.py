"""The same rows in any layout, and the check that layouts change nothing."""

from __future__ import annotations

import math

import torch
from cases import COMPLEMENTS, Case, frame_of
from devices import Run
from hypothesis import strategies as st

from aniso_ext import ops

LAYOUTS = ("contiguous", "offset", "row stride", "column stride", "transposed", "rows expanded", "all expanded")
# The element size times 8 is less than a vector, and 3 is odd: unaligned for every instruction set.
OFFSET = 3


def laid_out(rows: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout; whatever lies between and around them is NaN."""
    n, d = rows.shape
    if layout == "offset":
        flat = rows.new_full((OFFSET + n * d + OFFSET,), math.nan)
        view = flat[OFFSET : OFFSET + n * d].view(n, d)
    elif layout == "row stride":
        view = rows.new_full((2 * n + 1, d + 5), math.nan)[1::2, 2 : 2 + d]
    elif layout == "column stride":
        view = rows.new_full((n, 3 * d), math.nan)[:, ::3]
    elif layout == "transposed":
        view = rows.new_full((d, n), math.nan).T
    elif layout == "rows expanded":
        return rows[:1].expand(n, d) if n else rows
    elif layout == "all expanded":
        return rows[:1, :1].expand(n, d) if n and d else rows
    else:
        return rows.contiguous()
    view.copy_(rows)
    return view


def case_strategy(largest_width: int, knots: tuple[int, ...] = (2, 3, 17)) -> st.SearchStrategy[Case]:
    def build(width: int, half_rank: int, knots: int, complement: str, is_calibrated: bool) -> Case:
        return Case(width, min(2 * half_rank, width // 2 * 2), knots, complement, is_calibrated)

    widths, half_ranks = st.integers(2, largest_width), st.integers(1, largest_width // 2)
    return st.builds(build, widths, half_ranks, st.sampled_from(knots), st.sampled_from(COMPLEMENTS), st.booleans())


def check_layouts(case: Case, rows: int, run: Run, layouts: tuple[str, str, str], operator: str) -> None:
    """Inputs and gradients in these layouts give, bit for bit, what their contiguous copies give."""
    frame = frame_of(case)
    if operator == "decode":
        first = ops.encode(run.rows(case, rows), frame, backend="reference")
        inputs = [laid_out(first, layouts[0]), laid_out(run.deltas(case, rows), layouts[1])]
    else:
        inputs = [laid_out(run.rows(case, rows), layouts[0])]
    columns = case.width + (3 * case.blocks if operator == "encode" else 0)
    generator = torch.Generator().manual_seed(rows)
    cotangent = torch.randn(rows, columns, generator=generator).to(run.device, run.dtype)

    def results(values: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        # detach keeps the strides: the kernels meet these very layouts
        leaves = [value.detach().requires_grad_() for value in values]
        z = getattr(ops, operator)(*leaves, frame, backend=run.backend)
        return [z.detach(), *torch.autograd.grad(z, leaves, grad)]

    cotangent = laid_out(cotangent, layouts[2])
    ours = results(inputs, cotangent)
    plain = results([value.contiguous() for value in inputs], cotangent.contiguous())
    assert ours[0].shape == (rows, columns)
    for value, expected in zip(ours, plain, strict=True):
        assert value.dtype == run.dtype and torch.equal(value, expected)
