"""Every operator of one backend, forward and backward, at small ragged sizes: what `make sanitize` watches.

    python python_tests/sanitize_driver.py cuda
    python python_tests/sanitize_driver.py cuda --only decode --format bfloat16 --rows 130

Results are compared with the float64 reference on the CPU, so that a run in which nothing was computed is no clean one.
Exit code 77 without a CUDA device or without the backend.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

import torch
from cases import Case, deltas_of, frame_of, rows_of

from aniso_ext import ops
from aniso_ext.ops import backends

SKIPPED = 77
# Widths that are no multiple of a vector or a tile, ranks from one block to more than a tile, every complement.
CASES = (
    Case(37, 2, knots=2),
    Case(70, 22, knots=9, complement="diagonal", calibrated=True),
    Case(70, 22, knots=9, complement="diagonal_projected"),
    Case(128, 32, knots=64, calibrated=True),
    Case(264, 130, knots=17, calibrated=True),
)
# Each of these takes another shape of the Hopper kernels, the last one for float32 rows only; other kernels have one.
WIDE = (
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
OPERATORS = ("correct", "correct_sums", "encode", "decode")


def results(
    case: Case, y: torch.Tensor, deltas: torch.Tensor, backend: str, operators: Collection[str]
) -> dict[str, torch.Tensor]:
    """Outputs of the operators and their gradients, by name; the state that `decode` reads is the backend's own."""
    frame = frame_of(case)
    y, deltas = y.requires_grad_(), deltas.requires_grad_()
    found: dict[str, torch.Tensor] = {}

    def add(name: str, output: torch.Tensor, **leaves: torch.Tensor) -> None:
        found[name] = output
        grads = torch.autograd.grad(output, tuple(leaves.values()), torch.ones_like(output), retain_graph=True)
        found.update({f"gradient of {name}, {leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)})

    if "correct" in operators:
        add("correct", ops.correct(y, frame, backend=backend), y=y)
    if "correct_sums" in operators:
        found["correct_sums"] = ops.correct_sums(y.detach(), frame, backend=backend)
    if "encode" in operators or "decode" in operators:
        state = ops.encode(y, frame, backend=backend)
        if "encode" in operators:
            add("encode", state, y=y)
        if "decode" in operators:
            add("decode", ops.decode(state, deltas, frame, backend=backend), state=state, deltas=deltas)
    return {name: value.detach() for name, value in found.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error_of(result: str, ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the 2-norm; of the gradient of ``encode`` that of the row which nine in ten stay below, as it goes
    with 1/rho, whose square has no expectation."""
    if result != "gradient of encode, y":
        return float((ours - exact).norm() / exact.norm())
    rows = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    return float(rows.sort().values[int(0.9 * (len(rows) - 1))])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the operators of one backend for compute-sanitizer.")
    parser.add_argument("backend")
    parser.add_argument("--only", choices=OPERATORS, nargs="+", default=OPERATORS, help="these operators")
    formats = sorted({name_of(dtype) for dtype, _, _ in FORMATS})
    parser.add_argument("--format", choices=formats, nargs="+", default=formats, help="rows of these formats")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="batches of so many rows")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    backend = asked.backend
    if not torch.cuda.is_available():
        print("no CUDA device")
        return SKIPPED
    if backends.available()[backend] is not None:
        print(f"{backend} is not available: {backends.available()[backend]}")
        return SKIPPED
    worst: dict[str, float] = {}
    for dtype, precision, allowed in FORMATS:
        if name_of(dtype) not in asked.format or (dtype == torch.float64 and backend == "triton"):
            continue
        torch.set_float32_matmul_precision(precision)
        shaped = backend == "cuda" and dtype != torch.float64
        for case in CASES + WIDE if shaped else CASES:
            for rows in asked.rows:
                y, deltas = rows_of(case, rows, dtype), deltas_of(case, rows, dtype)
                ours = results(case, y.clone().cuda(), deltas.clone().cuda(), backend, asked.only)
                exact = results(case, y.double(), deltas.double(), "reference", asked.only)
                for result, expected in exact.items():
                    error = error_of(result, ours[result].cpu().double(), expected)
                    name = f"{name_of(dtype)} {precision}"
                    worst[name] = max(worst.get(name, 0.0), error)
                    if not error <= allowed:
                        print(f"{name} {case} N={rows}: {result} is off by {error:.2g}")
                        return 1
    print(f"{backend}: largest relative errors {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
