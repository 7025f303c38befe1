"""Every operator of one backend, forward and backward, at small ragged sizes: what `make sanitize` watches.

    python python_tests/sanitize_driver.py cuda

Results are compared with the float64 reference on the CPU, so that a run in which nothing was computed is no clean one.
Exit code 77 without a CUDA device or without the backend.
"""

from __future__ import annotations

import sys

import torch
from cases import Case, deltas_of, frame_of, rows_of

from aniso_ext import ops
from aniso_ext.ops import backends

SKIPPED = 77
# Widths that are no multiple of a vector or a tile, ranks from one block to more than a tile, every complement. Each
# width from 488 on takes another shape of the Hopper kernels, the last one for float32 rows only.
CASES = (
    Case(37, 2, knots=2),
    Case(70, 22, knots=9, complement="diagonal", calibrated=True),
    Case(70, 22, knots=9, complement="diagonal_projected"),
    Case(128, 32, knots=64, calibrated=True),
    Case(264, 130, knots=17, calibrated=True),
    Case(488, 64, knots=9, calibrated=True),
    Case(712, 48, knots=9, complement="diagonal", calibrated=True),
    Case(712, 48, knots=9, calibrated=True),
    Case(1000, 80, knots=9, calibrated=True),
    Case(1096, 112, knots=9, calibrated=True),
    Case(708, 22, knots=9, calibrated=True),
)
ROWS = (1, 65, 130)
FORMATS = (
    (torch.bfloat16, "highest", 0.1),
    (torch.float16, "highest", 0.1),
    (torch.float32, "highest", 1e-3),
    (torch.float32, "high", 0.1),
    (torch.float64, "highest", 1e-9),
)


def results(case: Case, y: torch.Tensor, deltas: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """Outputs of every operator, then the gradients of `correct`, of `encode` and of `decode` after it."""
    frame = frame_of(case)
    y, deltas = y.requires_grad_(), deltas.requires_grad_()
    corrected, state = ops.correct(y, frame, backend=backend), ops.encode(y, frame, backend=backend)
    decoded = ops.decode(state, deltas, frame, backend=backend)
    found = [corrected, ops.correct_sums(y.detach(), frame, backend=backend), state, decoded]
    for output, leaves in ((corrected, (y,)), (state, (y,)), (decoded, (state, deltas))):
        found += torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    return [value.detach() for value in found]


def main() -> int:
    backend = sys.argv[1]
    if not torch.cuda.is_available():
        print("no CUDA device")
        return SKIPPED
    if backends.available()[backend] is not None:
        print(f"{backend} is not available: {backends.available()[backend]}")
        return SKIPPED
    worst: dict[str, float] = {}
    for dtype, precision, allowed in FORMATS:
        if dtype == torch.float64 and backend == "triton":
            continue
        torch.set_float32_matmul_precision(precision)
        for case in CASES:
            for rows in ROWS:
                y, deltas = rows_of(case, rows, dtype), deltas_of(case, rows, dtype)
                ours = results(case, y.clone().cuda(), deltas.clone().cuda(), backend)
                exact = results(case, y.double(), deltas.double(), "reference")
                for index, (found, expected) in enumerate(zip(ours, exact, strict=True)):
                    error = float((found.cpu().double() - expected).norm() / expected.norm())
                    name = f"{str(dtype).removeprefix('torch.')} {precision}"
                    worst[name] = max(worst.get(name, 0.0), error)
                    if not error <= allowed:
                        print(f"{name} {case} N={rows}: output {index} is off by {error:.2g}")
                        return 1
    print(f"{backend}: largest relative errors {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
