"""Block sizes of the Triton kernels, measured on a GPU: what the table of ops/triton/configurations.py is chosen from.

    python benchmarks/tune_triton.py correct --dtype bf16 --width 1280 --rank 128
    python benchmarks/tune_triton.py correct_backward --configurations "64,64,8,3;128,64,8,3"
    python benchmarks/tune_triton.py all --dtype bf16 --seconds 60

Every candidate is compared with the float64 reference before it is timed. A line has block rows, block columns, warps,
stages and the most registers, then the median, the 20th and the 80th percentile in ns a row; the first line is the
table's present choice.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))

from cases import COMPLEMENTS, Case, frame_of  # the arrays that the tests use

from aniso_ext import ops
from aniso_ext.ops.triton import backend, launch
from aniso_ext.ops.triton.configurations import OPERATIONS, Configuration, configuration, overridden
from aniso_ext.ops.triton.constants import padded_blocks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
CHECKED_ROWS = 256
# relative error of the checked rows; gradients are held to the same, they are checked more closely by the tests
ALLOWED = {"bf16": 3e-2, "fp16": 6e-3, "tf32": 6e-3, "fp32": 1e-4}
A_THETA, A_RHO, A_V = 0.1, 0.1, 0.003


def rows_like(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Unit rows with a mean, made on the GPU: values hardly matter to the time, but gathers should spread as usual."""
    generator = torch.Generator("cuda").manual_seed(0)
    y = torch.empty(rows, width, dtype=dtype, device="cuda")
    scale = torch.arange(1, width + 1, device="cuda") ** -0.45
    for part in y.split(1 << 16):
        values = torch.randn(part.shape, generator=generator, device="cuda") * scale + 0.3 * scale[0]
        part.copy_(torch.nn.functional.normalize(values, dim=1))
    return y


def prepare(
    operation: str, case: Case, dtype: torch.dtype, rows: int
) -> tuple[Callable[[], object], Callable[[], float]]:
    """A call of the operation on all rows, and the relative error of its first rows."""
    frame, few = frame_of(case), slice(0, CHECKED_ROWS)
    y = rows_like(rows, case.width, dtype)
    direct = backend._initialisation(frame, y, norms=not operation.startswith("encode"))
    bounds = {"a_theta": A_THETA, "a_rho": A_RHO, "a_v": A_V}
    forward = operation.removesuffix("_backward")
    if operation in ("correct_leak", "correct_split", "split_backward"):
        forward = "correct"
    inputs: tuple[torch.Tensor, ...] = (y,)
    if forward == "decode":
        state = launch.encode_rows(y, *backend._initialisation(frame, y, norms=False))
        del y
        deltas = torch.empty(rows, case.rank + case.width, dtype=dtype, device="cuda")
        for part in deltas.split(1 << 16):
            part.normal_()
        inputs = (state, deltas)
        c = backend.constants(frame, state)
        direct = (
            *(c.project, c.rebuild, c.per_block, c.per_column, c.scalars, c.rank, c.forms, c.shifted, c.tf32),
            *(A_THETA, A_RHO, A_V, True),
        )

    def reference(*x: torch.Tensor) -> torch.Tensor:
        options = bounds if forward == "decode" else {}
        return getattr(ops, forward)(*x, frame, backend="reference", **options)

    def error(ours: object, theirs: object) -> float:
        pairs = zip(*(z if isinstance(z, tuple) else (z,) for z in (ours, theirs)), strict=True)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    if operation.endswith("_backward"):
        first = tuple(x[few].double().requires_grad_() for x in inputs)
        z = reference(*first)
        grad = rows_like(rows, z.shape[1], dtype)
        theirs = torch.autograd.grad(z, first, grad[few].double())
        function = getattr(launch, f"{forward}_backward")
        return (
            lambda: function(grad, *inputs, *direct),
            lambda: error(function(grad[few], *(x[few] for x in inputs), *direct), theirs),
        )
    function = {"encode": launch.encode_rows, "decode": launch.decode_rows}.get(forward) or getattr(launch, forward)
    exact = reference(*(x[few].double() for x in inputs))
    return (
        lambda: function(*inputs, *direct),
        lambda: error(function(*(x[few] for x in inputs), *direct), exact),
    )


def candidates(operation: str, dtype: torch.dtype, rank: int) -> Iterator[Configuration]:
    blocks = padded_blocks(rank // 2)
    for rows, columns, warps, stages in itertools.product((128, 64, 256, 32, 16), (64, 32, 128), (8, 4, 16), (3, 2, 4)):
        per_thread = rows * blocks * 2 / (warps * 32)  # one pair of sums; a kernel keeps up to three
        if 8 <= per_thread <= 128 and columns * (2 if dtype == torch.float32 else 1) <= 128:
            yield Configuration(rows, columns, warps, stages)


def measure(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call; rows are many times the cache, so that every call starts with a cold one."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)


def tune(operation: str, arguments: argparse.Namespace) -> None:
    dtype = DTYPES[arguments.dtype]
    torch.set_float32_matmul_precision("high" if arguments.dtype == "tf32" else "highest")
    needed = {"split_backward": "diagonal", "correct_split": "diagonal", "correct_leak": "diagonal_projected"}
    complement = needed.get(operation, arguments.complement)
    case = Case(arguments.width, arguments.rank, knots=arguments.knots, complement=complement, calibrated=True)
    call, error = prepare(operation, case, dtype, arguments.rows)
    capability, tf32 = launch.compute_capability(torch.device("cuda")), arguments.dtype == "tf32"
    present = configuration(operation, dtype, case.width, case.rank, capability, tf32=tf32)
    wanted = [Configuration(*map(int, text.split(","))) for text in filter(None, arguments.configurations.split(";"))]
    print(f"{operation} {case} {arguments.dtype} rows {arguments.rows} on {torch.cuda.get_device_name()}", flush=True)
    results: list[tuple[float, Configuration]] = []
    end = time.monotonic() + arguments.seconds
    for choice in dict.fromkeys((present, *(wanted or candidates(operation, dtype, case.rank)))):
        if time.monotonic() > end:
            print("  out of time", flush=True)
            break
        with overridden(choice):
            try:
                worst = error()
                used = launch.last_configuration()
                if used != choice:
                    print(f"  {tuple(choice)!s:20} does not fit", flush=True)
                    continue
                if not worst <= ALLOWED[arguments.dtype]:
                    print(f"  {tuple(choice)!s:20} WRONG by {worst:.1e}", flush=True)
                    continue
                times = [ms * 1e6 / arguments.rows for ms in measure(call, arguments.repeats)]
            except Exception as failure:  # a candidate that the compiler refuses must not end the search
                print(f"  {tuple(choice)!s:20} failed: {str(failure).splitlines()[:1]}", flush=True)
                continue
        median, low, high = (times[int(len(times) * q)] for q in (0.5, 0.2, 0.8))
        results.append((median, choice))
        print(f"  {tuple(choice)!s:20} {median:7.3f} [{low:.3f}, {high:.3f}] ns/row  error {worst:.1e}", flush=True)
    if results:
        print(f"  best {tuple(min(results)[1])} {min(results)[0]:.3f} ns/row", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", nargs="+", choices=(*OPERATIONS, "all"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--knots", type=int, default=1024)
    parser.add_argument("--complement", choices=COMPLEMENTS, default="scalar")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the candidates of one operation")
    parser.add_argument("--configurations", default="", help="rows,columns,warps,stages[,registers];...: not the grid")
    arguments = parser.parse_args()
    names = OPERATIONS if "all" in arguments.operation else arguments.operation
    for operation in names:
        tune(operation, arguments)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
