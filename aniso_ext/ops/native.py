"""The compiled CPU kernels behind the operators."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from aniso_ext.ops import autograd as autograd
from aniso_ext.ops.frame import Frame
from aniso_ext.ops.operands import Operands, operands
from aniso_ext.ops.reference import compute_dtype
from aniso_ext.ops.tracing import constant_while_tracing

_PACKAGE = Path(__file__).resolve().parent.parent


def library() -> str | None:
    """Path of the compiled library."""
    found = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    return str(found[0]) if found else None


@cache
def probe() -> str | None:
    """Load the kernels; None when they work, else the reason why they cannot be used."""
    path = library()
    if path is None:
        return "the compiled kernels were not built (install with a C++17 compiler; `aniso doctor` tells more)"
    try:
        torch.ops.load_library(path)
        # a first launch: a kernel that loads but cannot run must not be chosen
        rows = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float32, device="cpu")
        basis = rows.new_tensor([[1.0, 0.0], [0.0, 1.0]])
        torch.ops.aniso_ext.decode(rows, rows[:, :4], basis, None, 0.0, 0.0, 0.0, True)
    except (OSError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        return f"the compiled kernels do not work with torch {torch.__version__}: {reason}; build again"
    return None


@cache
def _has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 natively; otherwise such rows are widened to float32."""
    from aniso_ext import _build_info

    return bool(_build_info.has_bfloat16_products()) and torch.backends.mkldnn.is_available()


@constant_while_tracing
def _product_dtype(rows: torch.dtype, width: int, rank: int) -> torch.dtype:
    # A matrix unit that reads a row in groups of 32 reads into the next row where groups and rows do not end together;
    # times zero that is nothing, unless the next row holds a NaN.
    native = rows == torch.bfloat16 and width % 32 == 0 and rank % 32 == 0 and _has_bfloat16_products()
    return rows if native else compute_dtype(rows)


def _folded(rows: torch.Tensor, frame: Frame) -> Operands:
    product = _product_dtype(rows.dtype, frame.width, frame.rank)
    return operands(frame, product, compute_dtype(rows.dtype), rows.device)


def correct(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    constants = _folded(y, frame)
    return torch.ops.aniso_ext.correct(y, *constants.initialisation(), constants.shift)


def correct_into(y: torch.Tensor, frame: Frame, out: torch.Tensor) -> None:
    constants = _folded(y, frame)
    torch.ops.aniso_ext.correct_into(y, *constants.initialisation(), constants.shift, out)


_SUMMED_AT_ONCE = 16384  # rows whose stand-ins are held while they are summed


def correct_sums(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    uncalibrated, working = frame.with_output_mean(None), compute_dtype(y.dtype)
    sums = y.new_zeros(frame.width, dtype=torch.float64)
    for rows in y.split(_SUMMED_AT_ONCE):
        sums += correct(rows.to(working), uncalibrated).sum(dim=0, dtype=torch.float64)
    return sums


def encode(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    return torch.ops.aniso_ext.encode(y, *_folded(y, frame).initialisation())


def decode(
    state: torch.Tensor,
    deltas: torch.Tensor,
    frame: Frame,
    *,
    a_theta: float,
    a_rho: float,
    a_v: float,
    literal: bool,
    projected: bool,
) -> torch.Tensor:
    constants = _folded(state, frame)
    if literal and not projected:
        deltas = project_moves(deltas, frame)
    return torch.ops.aniso_ext.decode(state, deltas, constants.basis, constants.shift, a_theta, a_rho, a_v, not literal)


def project_moves(deltas: torch.Tensor, frame: Frame) -> torch.Tensor:
    """The paper's order, (I - QQ^T) before the tanh: a linear map that needs no kernel of its own (METHOD D11)."""
    working = compute_dtype(deltas.dtype)
    basis = frame.basis.to(device=deltas.device, dtype=working)
    polar, moves = deltas.to(working).split((frame.rank, frame.width), dim=1)
    return torch.cat((polar, moves - moves @ basis @ basis.T), dim=1).to(deltas.dtype)
