"""The Triton kernels without a GPU: in the interpreter, and compiled for every architecture that the package names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BRANCHES, Case, frame_of, rows_of

pytest.importorskip("triton", reason="Triton is not installed")
HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100)


def in_a_process(*command: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_pass_in_the_interpreter():
    """A process of its own: the choice of the interpreter is made when Triton is imported."""
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    output = in_a_process("-m", "pytest", *options, str(HERE / "triton_interpreted.py"), TRITON_INTERPRET="1")
    assert re.search(r"\d{3} passed", output) and "skipped" not in output


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_a_gpu_and_without_large_spills(architecture):
    """Of the shape that the package is tuned for. A few words of the part between the products may be spilled; more
    where benchmarks/tune_triton.py found that two spilling programs a multiprocessor are faster than one that does not.
    """
    output = in_a_process(str(HERE / "triton_compiled.py"), str(architecture), TRITON_INTERPRET="0")
    stacks = {name: int(stack) for name, stack in re.findall(r"^(\S+) registers \d+ stack (\d+)", output, re.M)}
    assert len(stacks) == 11, output
    measured = {"correct_backward": 2304, "decode": 384, "encode_backward": 256}
    large = {name: stack for name, stack in stacks.items() if stack > measured.get(name.split(",")[0], 160)}
    assert architecture != 90 or not large, output


def test_the_backend_says_why_it_is_missing_here():
    from aniso_ext.ops import backends

    reason = backends.available()["triton"]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        assert reason is None
    else:
        assert reason == "no CUDA device is visible"


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_table_is_taken_only_where_it_is_finer_than_the_format(dtype, sampled):
    """|T - secant| at dense radii, against the rounding of coefficients of that size."""
    from aniso_ext.ops.operands import radius_segments
    from aniso_ext.ops.radius_table import CELLS, secant_table
    from aniso_ext.ops.reference import radius_map
    from aniso_ext.ops.triton.constants import fold_constants, rounding_of

    case = Case(64, 16, knots=64, sampled=sampled)
    frame = frame_of(case)
    constants = fold_constants(frame, dtype, "ieee", torch.device("cpu"))
    source, target = frame.radius_source_knots, frame.radius_target_knots
    # radii at the levels of the knots, where the mass is, and between them
    between = 0.5 * (source[:, 1:] + source[:, :-1])
    radii = torch.cat((source, between, 2 * source[:, -1:], 0.1 * source[:, :1]), dim=1).T
    exact = radius_map(radii, source, target)
    table = secant_table(radius_segments(source, target))
    cell = (radii.T * CELLS / source[:, -1:]).long().clamp_max(CELLS)
    secant = (table[:, :, 0].gather(1, cell) + radii.T * table[:, :, 1].gather(1, cell)).T
    error, size = (exact - secant).square().mean().sqrt(), exact.square().mean().sqrt()
    if constants.forward.steps == 0:
        assert error <= rounding_of(dtype, "ieee") * size
        assert torch.allclose(constants.forward.cells[: case.blocks].double(), table, rtol=1e-6, atol=1e-6)
    else:
        assert dtype != torch.bfloat16
    if dtype == torch.float32:
        assert constants.forward.steps > 0 and constants.backward.steps > 0


@pytest.mark.parametrize("case", [BRANCHES[1], Case(64, 16, knots=1024, sampled=True), Case(24, 6, knots=2)], ids=str)
def test_the_search_ends_at_the_piece_of_every_radius(case):
    from aniso_ext.ops.operands import BUCKETS, radius_segments
    from aniso_ext.ops.triton.constants import fold_constants

    frame = frame_of(case)
    lookup = fold_constants(frame, torch.float32, "ieee", torch.device("cpu")).forward
    segments = radius_segments(frame.radius_source_knots, frame.radius_target_knots).float()
    for block in range(case.blocks):
        start = segments[block, :, 0]
        radii = torch.cat((start, torch.nextafter(start, start - 1)[1:], torch.rand(500) * 1.2 * start[-1]))
        bucket = (radii * (BUCKETS / start[-1])).clamp_max(BUCKETS - 1).int()
        below = lookup.cells[block][bucket.long()].long()
        for step in range(lookup.steps):
            half = 1 << (lookup.steps - 1 - step)
            below += torch.where(lookup.starts[block][below + half] <= radii, half, 0)
        assert torch.equal(below, torch.searchsorted(start[1:].contiguous(), radii, right=True))


def test_nothing_imports_triton_before_it_is_asked_for():
    program = "import sys, aniso_ext.ops, aniso_ext.ops.backends as b; print('triton' in sys.modules)"
    assert in_a_process("-c", program).strip() == "False"


def test_rows_of_another_device_are_refused():
    from aniso_ext import ops
    from aniso_ext.errors import AnisoError

    with pytest.raises(AnisoError, match="backend 'triton'"):
        ops.correct(rows_of(BRANCHES[0], 2).to("meta"), frame_of(BRANCHES[0]), backend="triton")
