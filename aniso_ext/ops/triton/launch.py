"""From tensors to launches: layouts, formats, grids. No arithmetic on rows."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from aniso_ext.ops.triton import backward, decode, encode, forward
from aniso_ext.ops.triton.configurations import Configuration, configuration, smaller
from aniso_ext.ops.triton.decode_backward import decode_backward_kernel

INTERPRETED = not isinstance(forward.correct_kernel, triton.JITFunction)
SUMMED_AT_ONCE = 1 << 20  # rows of one launch of correct_sums, whose partial sums are kept
_PRODUCTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_fitting: dict[Any, Configuration] = {}
_last: list[Configuration] = []


class Folded(NamedTuple):
    """Constants of a frame in the order of the operators' schemas; fields as in constants.Constants and Lookup."""

    project: torch.Tensor
    rebuild: torch.Tensor
    leak_project: torch.Tensor
    leak_rebuild: torch.Tensor
    per_block: torch.Tensor
    per_column: torch.Tensor
    scalars: torch.Tensor
    table: torch.Tensor
    buckets: torch.Tensor
    starts: torch.Tensor
    pieces: torch.Tensor
    cells: int
    steps: int
    coarse: bool
    coarse_slopes: bool
    rank: int
    split: bool
    shifted: bool
    tf32: bool

    def arrays(self) -> tuple[torch.Tensor, ...]:
        # two neighbouring float32 as one int64, which a kernel gathers at once
        return (*self[:10], self.pieces.view(torch.int64))

    @property
    def joined(self) -> bool:
        return self.project.dtype == torch.bfloat16 and self.project.shape[0] > 2 * self.per_block.shape[1]

    def meta(self, *, gradient: bool = False) -> dict[str, Any]:
        cells = 0 if gradient and not self.coarse_slopes else self.cells
        searched = cells == 0 or self.coarse
        return {
            "PADDED": self.per_column.shape[1],
            "P": self.per_block.shape[1],
            "CELLS": cells,
            "STEPS": self.steps if searched else 0,
            "PIECES": self.pieces.shape[1] if searched else 0,
            "SPLIT": self.split,
            "LEAK": self.leak_project.numel() > 0,
        }


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows as kernels read them: where they lie if their columns lie side by side, else copied.

    The compiler lays sums out by what it knows of alignment. Rows that begin elsewhere than those of a fresh tensor are
    copied too, so that no result depends on the layout.
    """
    like_fresh = (rows.stride(0) % 16 == 0) == (rows.shape[1] % 16 == 0) and rows.data_ptr() % 16 == 0
    return rows if rows.stride(1) == 1 and like_fresh else rows.clone(memory_format=torch.contiguous_format)


def formats(basis: torch.Tensor, tf32: bool) -> dict[str, Any]:
    """Formats of tiles and of products; float32 rows at TF32 are multiplied in the format of their basis."""
    if tf32:
        return {"PRODUCT": tl.float32, "PRECISION": "fp16" if basis.dtype == torch.float16 else "tf32"}
    # the interpreter has no bfloat16 of its own
    widened = INTERPRETED and basis.dtype == torch.bfloat16
    return {"PRODUCT": tl.float32 if widened else _PRODUCTS[basis.dtype], "PRECISION": "ieee"}


def for_gradients(folded: Any) -> Any:
    """The constants with a basis of float32 at TF32: gradients may be of any size, and float16 has few exponents."""
    if not folded.tf32:
        return folded
    bases = ("project", "rebuild", "leak_project", "leak_rebuild")
    return folded._replace(**{name: getattr(folded, name).float() for name in bases if name in folded._fields})


@cache
def compute_capability(device: torch.device) -> int:
    """Of a CUDA device, 90 for 9.0; 0 of the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def options(choice: Configuration, dtype: torch.dtype) -> dict[str, Any]:
    """How a kernel for rows of a dtype is compiled.

    Left to themselves compiler and assembler fuse some products with sums, here and not there. Rows of float16 and of
    float32 at TF32 came out otherwise at another place of a batch; and of float32 rows, whose sums begin with a single
    product in each thread, threads that share a sum rounded it differently, and one of them wrote it
    (triton-lang/triton#7264). Threads that work for a row of bfloat16 add more than one product each.
    """
    return {
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
        "maxnreg": choice.registers or None,
        "enable_fp_fusion": dtype == torch.bfloat16,
    }


def last_configuration() -> Configuration | None:
    """What the last launch used; None before one."""
    return _last[0] if _last else None


def _launch(
    kernel: Any, operation: str, like: torch.Tensor, count: int, rank: int, *arguments: Any, **meta: Any
) -> None:
    """Launch over blocks of rows, in the first configuration that the device has room for.

    An argument may be a function of the number of programs.
    """
    width, precision = meta["WIDTH"], meta["PRECISION"]
    capability = compute_capability(like.device)
    tf32 = precision != "ieee"
    choice = configuration(operation, like.dtype, width, rank, capability, tf32=tf32)
    key = (operation, like.dtype, precision, width, rank, kernel, choice, like.device)
    candidates = [_fitting[key]] if key in _fitting else list(smaller(choice))
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        for candidate in candidates:
            programs = triton.cdiv(count, candidate.block_rows)
            try:
                kernel[(programs,)](
                    *(argument(programs) if callable(argument) else argument for argument in arguments),
                    **meta,
                    BLOCK_ROWS=candidate.block_rows,
                    BLOCK_COLUMNS=candidate.block_columns,
                    **options(candidate, like.dtype),
                )
            except OutOfResources:
                if candidate == candidates[-1]:
                    raise
            else:
                _fitting[key] = candidate
                _last[:] = [candidate]
                return


def correct(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    folded, rows = Folded(*constants), _rows(y)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if len(y):
        plain = "correct_split" if folded.split else "correct"
        operation = "correct_leak" if folded.leak_project.numel() else plain
        _launch(
            forward.correct_kernel, operation, y, len(y), folded.rank,
            rows, out, *folded.arrays(), len(y), rows.stride(0),
            WIDTH=y.shape[1], SHIFTED=folded.shifted, JOINED=folded.joined, ONLY_SUMS=False,
            **folded.meta(),
            **formats(folded.project, folded.tf32),
        )  # fmt: skip
    return out


def correct_sums(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    folded, rows, width = Folded(*constants), _rows(y), y.shape[1]
    padded, blocks = folded.per_column.shape[1], folded.per_block.shape[1]
    parts = 5 if folded.split else 3
    sums = torch.zeros(padded + parts * blocks, dtype=torch.float64, device=y.device)
    for part in rows.split(SUMMED_AT_ONCE):
        if len(part) == 0:
            continue
        partials: list[torch.Tensor] = []

        def partial_sums(programs: int, partials: list[torch.Tensor] = partials) -> torch.Tensor:
            partials.append(torch.empty(programs, padded + parts * blocks, dtype=torch.float32, device=y.device))
            return partials[-1]

        _launch(
            forward.correct_kernel, "correct_sums", y, len(part), folded.rank,
            part, partial_sums, *folded.arrays(), len(part), part.stride(0),
            WIDTH=width, SHIFTED=False, JOINED=folded.joined, ONLY_SUMS=True, **folded.meta(),
            **formats(folded.project, folded.tf32),
        )  # fmt: skip
        partial = partials[-1]
        sums[:width] += partial[:, :width].sum(dim=0, dtype=torch.float64)
        sums[padded:] += partial[:, padded:].sum(dim=0, dtype=torch.float64)
    k_a, k_b, weight, *inner = sums[padded:].view(parts, blocks)
    # even columns, then odd ones
    basis = folded.rebuild[:width].double().unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
    moved, rest = basis @ torch.cat((k_a, k_b)), sums[:width]
    if folded.split:
        rest = rest - basis @ torch.cat(tuple(inner))
    scale, offset, _ = folded.per_column[:, :width].double()
    return moved + scale * rest + offset * weight[0]


def encode_rows(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    folded, rows = Folded(*constants), _rows(y)
    blocks, width = folded.rank // 2, y.shape[1]
    out = torch.empty((len(y), 3 * blocks + width), dtype=y.dtype, device=y.device)
    if len(y):
        _launch(
            encode.encode_kernel, "encode", y, len(y), folded.rank,
            rows, out, *folded.arrays(), len(y), rows.stride(0),
            WIDTH=width, BLOCKS=blocks, JOINED=folded.joined and not folded.split, **folded.meta(),
            **formats(folded.project, folded.tf32),
        )  # fmt: skip
    return out


def encode_backward(grad: torch.Tensor, y: torch.Tensor, *constants: Any) -> torch.Tensor:
    folded, rows, grads = for_gradients(Folded(*constants)), _rows(y), _rows(grad)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if len(y):
        _launch(
            encode.encode_backward_kernel, "encode_backward", y, len(y), folded.rank,
            grads, rows, out, *folded.arrays(), len(y), grads.stride(0), rows.stride(0),
            WIDTH=y.shape[1], BLOCKS=folded.rank // 2, JOINED=folded.joined and not folded.split,
            **folded.meta(gradient=True),
            **formats(folded.project, folded.tf32),
        )  # fmt: skip
    return out


def correct_backward(grad: torch.Tensor, y: torch.Tensor, *constants: Any) -> torch.Tensor:
    folded, rows, grads = for_gradients(Folded(*constants)), _rows(y), _rows(grad)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if len(y):
        kernel = backward.split_backward_kernel if folded.split else backward.correct_backward_kernel
        joined = {} if folded.split else {"JOINED": folded.joined}
        _launch(
            kernel, "split_backward" if folded.split else "correct_backward", y, len(y), folded.rank,
            grads, rows, out, *folded.arrays(), len(y), grads.stride(0), rows.stride(0),
            WIDTH=y.shape[1], SHIFTED=folded.shifted, **joined, **folded.meta(gradient=True),
            **formats(folded.project, folded.tf32),
        )  # fmt: skip
    return out


class Update(NamedTuple):
    """Constants of ``decode`` in the order of its schema."""

    project: torch.Tensor
    rebuild: torch.Tensor
    per_block: torch.Tensor
    per_column: torch.Tensor
    scalars: torch.Tensor
    rank: int
    forms: bool
    shifted: bool
    tf32: bool
    a_theta: float
    a_rho: float
    a_v: float
    project_step: bool

    def meta(self) -> dict[str, Any]:
        return {
            "PADDED": self.per_column.shape[1],
            "P": self.per_block.shape[1],
            "BLOCKS": self.rank // 2,
            "FORMS": self.forms,
            "JOINED": self.forms and self.project.shape[0] % (2 * self.per_block.shape[1]) != 0,
            "SHIFTED": self.shifted,
            "PROJECT": self.project_step,
            "FAST": self.project.dtype != torch.float32 and not self.tf32,
            **formats(self.project, self.tf32),
        }


def decode_rows(state: torch.Tensor, deltas: torch.Tensor, *constants: Any) -> torch.Tensor:
    update, states, moves = Update(*constants), _rows(state), _rows(deltas)
    width = state.shape[1] - update.rank // 2 * 3
    out = torch.empty((len(state), width), dtype=state.dtype, device=state.device)
    if len(state):
        _launch(
            decode.decode_kernel, "decode", state, len(state), update.rank,
            states, moves, out, *update[:5], len(state), states.stride(0), moves.stride(0), *update[9:12],
            WIDTH=width, **update.meta(),
        )  # fmt: skip
    return out


def decode_backward(
    grad: torch.Tensor, state: torch.Tensor, deltas: torch.Tensor, *constants: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    update, grads, states, moves = for_gradients(Update(*constants)), _rows(grad), _rows(state), _rows(deltas)
    grad_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    grad_deltas = torch.empty(deltas.shape, dtype=state.dtype, device=state.device)
    if len(state):
        _launch(
            decode_backward_kernel, "decode_backward", state, len(state), update.rank,
            grads, states, moves, grad_state, grad_deltas, *update[:5], len(state),
            grads.stride(0), states.stride(0), moves.stride(0), *update[9:12],
            WIDTH=state.shape[1] - update.rank // 2 * 3, **update.meta(),
        )  # fmt: skip
    return grad_state, grad_deltas
