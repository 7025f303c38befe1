"""``ops.correct`` on one CPU thread, against its own matrix products, stock PyTorch and torch.compile.

Every variant is compared with the float64 reference before it is timed. A batch has 4 096 rows: its result is memory
that the allocator has at hand. Results past 32 MiB come from fresh pages, which every variant pays the system to clear.
Run by ``make bench``, which writes benchmarks/results/cpu_closed_form.csv and the table in README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import ENCODERS, Case, frame_of, rows_of

from aniso_ext import ops
from aniso_ext.bench.folded import FoldedForm

ROWS = 4096
CHUNK = 256
ROUNDS = 40
CASES = [replace(case, calibrated=True, sampled=True) for case in ENCODERS if case.rank == 128]
# "eager" goes through METHOD step by step, as the reference backend does; "folded" has the kernels' algebra
VARIANTS = ["products, chunked", "products, whole", "aniso_ext", "eager", "eager, folded", "compiled, folded"]
# Rounding of the inputs and of the result; the kernels' own contract is tested in python_tests.
LARGEST_COSINE_LOSS = {torch.float32: 1e-10, torch.bfloat16: 2e-5}


def library_products(case: Case, y: torch.Tensor, chunk: int) -> Callable[[], None]:
    """Only the two matrix products, through the faster library (oneDNN), a chunk at a time."""
    basis = frame_of(case).basis.to(y.dtype)
    linear, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight

    def run() -> None:
        project, rebuild = reorder(basis.T.contiguous(), chunk), reorder(basis, chunk)
        for rows in y.split(chunk):
            linear(linear(rows, project, None, "none", [], ""), rebuild, None, "none", [], "")

    return run


def closed_form(variant: str, case: Case, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    frame = frame_of(case)
    if variant == "aniso_ext":
        return lambda: ops.correct(y, frame, backend="cpu")
    if variant == "eager":
        frame = frame.to(dtype=torch.float32)
        return lambda: ops.correct(y, frame, backend="reference")
    stock = FoldedForm(frame, y.dtype).correct
    function = torch.compile(stock, fullgraph=True) if variant == "compiled, folded" else stock
    return lambda: function(y)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_closed_form(benchmark, dtype: torch.dtype, case: Case, variant: str) -> None:
    y = rows_of(case, ROWS, dtype)
    benchmark.group = f"{str(dtype).removeprefix('torch.')} D={case.width} R={case.rank}"
    benchmark.extra_info.update(
        variant=variant, dtype=str(dtype).removeprefix("torch."), D=case.width, R=case.rank, rows=ROWS
    )
    if variant.startswith("products"):
        run = library_products(case, y, CHUNK if variant.endswith("chunked") else ROWS)
    else:
        run = closed_form(variant, case, y)
        expected = ops.correct(y.double(), frame_of(case), backend="reference")
        loss = 1 - torch.nn.functional.cosine_similarity(run().double(), expected, dim=1).min()
        # plain PyTorch in bfloat16 rounds every step; it is timed all the same, and only has to be the same function
        assert loss <= (1e-3 if variant != "aniso_ext" and dtype == torch.bfloat16 else LARGEST_COSINE_LOSS[dtype])
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=10)
