"""The Triton kernels without a GPU: in the interpreter, and compiled for every architecture that the package names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import BRANCHES, Case, frame_of, frame_with_jumps, rows_of

from aniso_ext.ops import hopper
from aniso_ext.ops.operands import BUCKETS, radius_segments
from aniso_ext.ops.reference import radius_map
from aniso_ext.ops.triton.constants import BUCKET_SCALE, LAST_SLOPE, UNIT, fold_constants

pytest.importorskip("triton", reason="Triton is not installed")
HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100)
SAMPLED = Case(96, 48, knots=1024, sampled=True)


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
    """Of the shape that the package is tuned for. A few words of the part between the products may be spilled."""
    output = in_a_process(str(HERE / "triton_compiled.py"), str(architecture), TRITON_INTERPRET="0")
    stacks = {name: int(stack) for name, stack in re.findall(r"^(\S+) registers \d+ stack (\d+)", output, re.M)}
    assert len(stacks) == 11, output
    large = {name: stack for name, stack in stacks.items() if stack > 200}
    assert architecture != 90 or not large, output


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_thread_and_row_of_float16_has_the_same_arithmetic(architecture):
    """And no kernel is empty: the compiler makes a trap of what it cannot place in tensor memory."""
    from triton_compiled import KERNELS

    cases = [*(f"{operation},fp16,1280,128" for operation in KERNELS), "decode,fp16,1280,256"]
    output = in_a_process(str(HERE / "triton_compiled.py"), str(architecture), *cases, TRITON_INTERPRET="0")
    found = re.findall(r"registers (\d+) .* fusible (\d+)", output)
    assert len(found) == len(cases)
    for registers, fusible in found:
        assert int(registers) > 64 and int(fusible) == 0, output


def test_every_thread_and_row_of_float32_has_the_same_arithmetic():
    from triton_compiled import KERNELS

    cases = [f"{operation},{format},256,32" for operation in KERNELS for format in ("fp32", "tf32")]
    output = in_a_process(str(HERE / "triton_compiled.py"), "90", *cases, TRITON_INTERPRET="0")
    assert re.findall(r"fusible (\d+)", output) == ["0"] * len(cases), output


def test_the_backend_says_why_it_is_missing_here():
    from aniso_ext.ops import backends

    reason = backends.available()["triton"]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        assert reason is None
    else:
        assert reason == "no CUDA device is visible"


def table_of(constants) -> torch.Tensor:
    """Start and rise of every cell, [P, cells + 1, 2]."""
    return constants.lookup.table.view(torch.float16).view(*constants.lookup.table.shape, 2).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Case(96, 48, knots=64), SAMPLED, BRANCHES[0]], ids=str)
def test_a_cell_of_the_table_is_off_by_no_more_than_it_may_or_is_coarse(case, dtype):
    """T of the table as the kernels compute it, at the knots, between them, near zero and past the last one."""
    frame = frame_of(case)
    constants = fold_constants(frame, dtype, "tf32", torch.device("cpu"))
    cells, blocks = constants.lookup.cells, constants.per_block[:, : case.blocks].double()
    assert cells > 0
    source, target = frame.radius_source_knots, frame.radius_target_knots
    between = 0.5 * (source[:, 1:] + source[:, :-1])
    radii = torch.cat((source, between, 2 * source[:, -1:], 0.1 * source[:, :1]), dim=1)
    position = (radii * blocks[BUCKET_SCALE][:, None] * cells / BUCKETS).clamp_max(cells)
    start, rise = table_of(constants)[: case.blocks].gather(1, position.long()[..., None].expand(-1, -1, 2)).unbind(2)
    step = start + rise * (position - position.floor())
    found = radii * blocks[LAST_SLOPE][:, None] + blocks[UNIT][:, None] * step
    exact = radius_map(radii.T, source, target).T
    rounding, size = torch.finfo(hopper.product_dtype(dtype)).eps / 2, target.square().mean().sqrt()
    most, most_of_cell = (error * rounding * size for error in hopper.largest_errors(dtype, case.blocks))
    fine = ~start.isnan()
    slack = 8 * 2.0**-24 * (exact.abs() + 16 * radii)  # the scales are float32
    assert ((found - exact).abs() <= most_of_cell + slack)[fine].all()
    assert (found - exact)[:, : case.knots][fine[:, : case.knots]].square().mean().sqrt() <= 1.01 * most
    assert constants.lookup.coarse == bool(table_of(constants).isnan().any())
    assert not table_of(constants)[case.blocks :].any()


def test_where_there_is_no_table():
    exactly = fold_constants(frame_of(SAMPLED), torch.float32, "ieee", torch.device("cpu"))
    narrow = fold_constants(frame_of(Case(48, 16)), torch.bfloat16, "ieee", torch.device("cpu"))
    jumps = fold_constants(frame_with_jumps(SAMPLED, 8), torch.float16, "ieee", torch.device("cpu"))
    for constants in (exactly, narrow, jumps):
        assert constants.lookup.cells == constants.lookup.table.numel() == 0 and constants.lookup.steps > 0


@pytest.mark.parametrize("case", [BRANCHES[1], Case(64, 16, knots=1024, sampled=True), Case(24, 6, knots=2)], ids=str)
def test_the_search_ends_at_the_piece_of_every_radius(case):
    frame = frame_of(case)
    lookup = fold_constants(frame, torch.float32, "ieee", torch.device("cpu")).lookup
    segments = radius_segments(frame.radius_source_knots, frame.radius_target_knots).float()
    for block in range(case.blocks):
        start = segments[block, :, 0]
        radii = torch.cat((start, torch.nextafter(start, start - 1)[1:], torch.rand(500) * 1.2 * start[-1]))
        bucket = (radii * (BUCKETS / start[-1])).clamp_max(BUCKETS - 1).int()
        below = lookup.buckets[block][bucket.long()].long()
        for step in range(lookup.steps):
            half = 1 << (lookup.steps - 1 - step)
            below += torch.where(lookup.starts[block][below + half] <= radii, half, 0)
        assert torch.equal(below, torch.searchsorted(start[1:].contiguous(), radii, right=True))


@pytest.mark.parametrize("case", [BRANCHES[1], replace(BRANCHES[3], complement="diagonal")], ids=str)
def test_offset_and_shift_are_rows_of_the_basis_in_two_pieces(case):
    frame = frame_of(case)
    constants = fold_constants(frame, torch.bfloat16, "ieee", torch.device("cpu"))
    joined = constants.project[2 * constants.per_block.shape[1] :].double()
    unit, power = constants.scalars[4:].double()
    assert unit * power == (constants.scalars[0].double() if case.complement == "scalar" else 1.0)
    assert power == power.bfloat16().double() and (1 <= unit < 2)
    for row, value in ((0, constants.per_column[1]), (2, constants.per_column[2])):
        value = value.double() / unit
        assert ((joined[row] + joined[row + 1] - value).abs() <= 2.0**-16 * value.abs()).all()
    assert torch.equal(joined[4:6], joined[[2, 0]]) and not joined[6:].any()


def test_nothing_imports_triton_before_it_is_asked_for():
    program = "import sys, aniso_ext.ops, aniso_ext.ops.backends as b; print('triton' in sys.modules)"
    assert in_a_process("-c", program).strip() == "False"


def test_rows_of_another_device_are_refused():
    from aniso_ext import ops
    from aniso_ext.errors import AnisoError

    with pytest.raises(AnisoError, match="backend 'triton'"):
        ops.correct(rows_of(BRANCHES[0], 2).to("meta"), frame_of(BRANCHES[0]), backend="triton")
