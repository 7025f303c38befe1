"""What only a GPU shows: streams, graphs, memory that nobody wrote, offsets past 2^31, and shapes that fit no tile.

Values, gradients, layouts and the operators as PyTorch sees them are tested for all backends in test_ops_values.py and
its neighbours, which `pytest -m gpu` runs here as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import compositions
import pytest
import torch
from cases import BRANCHES, ENCODERS, Case, arrays_of, calibrated, deltas_on, frame_of, named, rows_of, rows_on
from devices import ON_GPU, Run, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, case_strategy, check_layouts

from aniso_ext import ops
from aniso_ext.errors import InputError
from aniso_ext.ops import backends, hopper

pytestmark = pytest.mark.gpu

HALF_AND_SINGLE = ("float32", "bfloat16")
WIDE = calibrated(Case(1280, 128, knots=64))
SMALL = BRANCHES[1]
TILES = calibrated(Case(96, 32))


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


class Batch(NamedTuple):
    """Inputs of all operations: rows, deltas, and a state that the reference encoded."""

    y: torch.Tensor
    deltas: torch.Tensor
    state: torch.Tensor

    @classmethod
    def of(cls, case: Case, rows: int, run: Run, *, seed: int = 0) -> Batch:
        y = run.rows(case, rows, seed=seed)
        return cls(y, run.deltas(case, rows, seed=seed), ops.encode(y, frame_of(case), backend="reference"))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(*(function(value) for value in self))


def calls(case: Case, batch: Batch, backend: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Every operation of a backend as a function of nothing."""
    frame = frame_of(case)
    return {
        "correct": lambda: ops.correct(batch.y, frame, backend=backend),
        "correct_sums": lambda: ops.correct_sums(batch.y, frame, backend=backend),
        "encode": lambda: ops.encode(batch.y, frame, backend=backend),
        "decode": lambda: ops.decode(batch.state, batch.deltas, frame, backend=backend),
    }


def gradients(batch: Batch, run_operator: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients by a function of an operator's name and its inputs; the cotangents have signs of no pattern."""
    y, deltas, state = batch.map(lambda value: value.detach().requires_grad_())
    found = {}
    for name, leaves in (("correct", (y,)), ("encode", (y,)), ("decode", (state, deltas))):
        z = run_operator(name, *leaves)
        cotangent = torch.cos(1e3 * torch.arange(z.numel(), device=z.device)).view_as(z).to(z)
        grads = torch.autograd.grad(z, leaves, cotangent)
        found |= {f"gradient {index} of {name}": grad for index, grad in enumerate(grads)}
    return found


def everything(case: Case, batch: Batch, backend: str) -> dict[str, torch.Tensor]:
    def operator(name: str, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(ops, name)(*inputs, frame_of(case), backend=backend)

    return {name: call() for name, call in calls(case, batch, backend).items()} | gradients(batch, operator)


def composed_gradients(case: Case, batch: Batch) -> dict[str, torch.Tensor]:
    def operator(name: str, *inputs: torch.Tensor) -> torch.Tensor:
        options = () if name == "decode" else (case.complement,)
        return getattr(compositions, name)(*inputs, arrays_of(case), *options)

    return gradients(batch, operator)


def cosine_loss(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(result.double(), expected.double(), dim=1)).max())


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


# Relative errors of whatever is not unit rows, where nothing but a mistake in indexing is looked for: the contract is
# tested in test_ops_values.py and test_ops_gradients.py.
LOOSE = {"float64": 1e-8, "float32": 1e-3, "tf32": 0.1, "bfloat16": 0.1, "float16": 0.05}


def check_against_reference(case: Case, rows: int, run: Run) -> None:
    batch = Batch.of(case, rows, run)
    ours, exact = everything(case, batch, run.backend), everything(case, batch.map(torch.Tensor.double), "reference")
    composed = composed_gradients(case, batch)
    for name, value in ours.items():
        assert value.shape == exact[name].shape
        if name in ("correct", "decode"):
            assert cosine_loss(value, exact[name]) <= max(run.cosine_loss, 1e-14), name
            continue
        allowed = LOOSE[run.format]
        if name in composed and run.format != "float16":  # there squares of radii underflow in the composition
            # a radius near zero enlarges roundings of its block without limit, in any implementation
            allowed = max(allowed, 3 * relative_error(composed[name], exact[name]))
        assert relative_error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("name", ON_GPU)
def test_this_machine_has_every_backend_for_gpus(name):
    """Elsewhere the tests of a backend that cannot run are skipped; here that would hide a broken build."""
    assert backends.available()[name] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_runs_a_kernel_and_meets_the_contract(dtype, device):
    y = rows_of(WIDE, 300, dtype).to(device)
    assert backends.explain(device).startswith(("auto on cuda takes cuda", "auto on cuda takes triton"))
    exact = ops.correct(y.double(), frame_of(WIDE), backend="reference")
    bound = {torch.float64: 1e-14, torch.float32: 1e-10, torch.float16: 1e-6, torch.bfloat16: 2e-5}[dtype]
    assert cosine_loss(ops.correct(y, frame_of(WIDE)), exact) <= bound


@runs(["triton"], ["float32"])
def test_triton_refuses_float64(run):
    with pytest.raises(InputError, match="float64"):
        ops.correct(run.rows(SMALL, 3).double(), frame_of(SMALL), backend="triton")


@runs(ON_GPU, ["float32"])
def test_rows_on_the_cpu_are_refused(run):
    with pytest.raises(InputError, match=f"backend '{run.backend}' runs on cuda tensors, got cpu"):
        ops.correct(rows_of(SMALL, 3, run.dtype), frame_of(SMALL), backend=run.backend)


@runs(ON_GPU, ["float32"])
def test_a_frame_on_either_device_gives_the_same_rows(run):
    y = run.rows(SMALL, 20)
    frames = (frame_of(SMALL), frame_of(SMALL).to("cuda"), frame_of(SMALL).to("cuda:0"))
    first, *others = (ops.correct(y, frame, backend=run.backend) for frame in frames)
    # folded on another device, constants may round in another order
    assert all(cosine_loss(first, other) <= 1e-12 for other in others)


# The shapes below are drawn once for a compiled backend and from a short list for Triton, which compiles every new one.
ANY_LAYOUT = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ROWS = st.sampled_from([0, 1, 2, 3, 31, 33, 64, 129])
OPERATORS = st.sampled_from(["correct", "encode", "decode"])


@settings(ANY_LAYOUT, max_examples=150)
@given(case=case_strategy(150), rows=ROWS, layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3), operator=OPERATORS)
@runs(["cuda"])
def test_any_layout_gives_the_result_of_the_contiguous_copy(case, rows, layouts, operator, run):
    check_layouts(case, rows, run, layouts, operator)


@settings(ANY_LAYOUT, max_examples=60)
@given(
    case=st.sampled_from([SMALL, BRANCHES[5], TILES, Case(33, 32, knots=3)]),
    rows=ROWS,
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    operator=OPERATORS,
)
@runs(["triton"], HALF_AND_SINGLE)
def test_any_layout_gives_the_result_of_the_contiguous_copy_triton(case, rows, layouts, operator, run):
    check_layouts(case, rows, run, layouts, operator)


@settings(ANY_LAYOUT, max_examples=40)
@given(case=case_strategy(150, knots=(17, 64)), rows=st.sampled_from([1, 3, 31, 33, 129, 300]))
@runs(["cuda"])
def test_any_shape_agrees_with_the_reference(case, rows, run):
    check_against_reference(case, rows, run)


@pytest.mark.parametrize("rows", [1, 2, 31, 33, 127, 129, 1000])
@pytest.mark.parametrize("case", **named([SMALL, BRANCHES[2], BRANCHES[5], TILES]))
@runs(ON_GPU, HALF_AND_SINGLE)
def test_any_number_of_rows_agrees_with_the_reference(case, rows, run):
    check_against_reference(case, rows, run)


@pytest.mark.parametrize("case", **named([calibrated(Case(1032, 1024, knots=9)), Case(4096, 130, knots=9)]))
@runs(ON_GPU, HALF_AND_SINGLE, fewer={"triton": ["bfloat16"]})
def test_the_largest_ranks_and_widths_agree_with_the_reference(case, run):
    check_against_reference(case, 130, run)


@pytest.mark.parametrize("case", **named([SMALL, WIDE]))
@runs(ON_GPU, ["float64", *HALF_AND_SINGLE])
def test_every_element_is_written(case, run):
    """Free blocks of the allocator hold NaN in any format; whatever is not written comes out as one."""
    for rows in (1, 33, 2000):
        batch = Batch.of(case, rows, run)
        everything(case, batch, run.backend)  # constants are folded and kept before the memory is spoilt
        poison_free_memory()
        assert torch.empty(rows, case.width, dtype=run.dtype, device=run.device).isnan().any()
        for name, value in everything(case, batch, run.backend).items():
            assert value.isfinite().all(), (name, rows)


def poison_free_memory() -> None:
    """Blocks of every size, each until the allocator has to ask the device for more: then nothing free is left out."""
    torch.cuda.empty_cache()
    blocks = []
    least_of_large_pool = 2**20 + 512
    powers = [2**power for power in range(27, 8, -1)]
    for size in sorted([*powers, least_of_large_pool], reverse=True):
        grown = False
        while not grown:
            reserved = torch.cuda.memory_reserved()
            blocks.append(torch.full((size,), 255, dtype=torch.uint8, device="cuda"))
            grown = torch.cuda.memory_reserved() > reserved
    torch.cuda.synchronize()


@runs(ON_GPU, ["float32"])
def test_kernels_run_on_the_current_stream(run):
    batch = Batch.of(SMALL, 500, run)
    expected = everything(SMALL, batch, run.backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delayed = batch.map(torch.zeros_like)
        torch.cuda._sleep(20_000_000)  # the copies below land late: a kernel on another stream would read zeros
        for late, value in zip(delayed, batch, strict=True):
            late.copy_(value)
        found = everything(SMALL, delayed, run.backend)
    stream.synchronize()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("case", **named([SMALL, WIDE]))
@runs(ON_GPU, ["float32", "tf32", "bfloat16", "float16"])
def test_a_hundred_runs_are_equal_bit_for_bit(case, run):
    """Among other work, so that blocks meet another order of blocks."""
    batch = Batch.of(case, 3001, run)
    first = everything(case, batch, run.backend)
    noise, side = torch.randn(1024, 1024, device=run.device), torch.cuda.Stream()
    different = torch.zeros((), dtype=torch.int64, device=run.device)
    for _ in range(100):
        with torch.cuda.stream(side):
            noise @ noise
        for name, value in everything(case, batch, run.backend).items():
            different += (value != first[name]).sum()
    assert int(different) == 0


@pytest.mark.parametrize("case", **named([*map(calibrated, ENCODERS), Case(1280, 128, 1024, "diagonal", True)]))
@runs(ON_GPU, ["bfloat16", "tf32"], fewer={"triton": ["bfloat16"]})
def test_a_full_device_repeats_bit_for_bit(case, run):
    """Blocks that hand parts of a row to each other meet at every possible moment only where all of them are busy for
    many tiles: a handover that comes too early once in a million tiles shows here, and hardly in a few thousand rows.
    """
    frame, y = frame_of(case), rows_on(case, 2**19, run.dtype, run.device)
    operations = {"correct": ops.correct, "encode": ops.encode, "correct_sums": ops.correct_sums}
    for name, operation in operations.items():
        if name != "correct" and (case.complement != "scalar" or run.format == "tf32"):
            continue  # without a kernel in which blocks hand over
        first = operation(y, frame, backend=run.backend)
        different = torch.zeros((), dtype=torch.int64, device=run.device)
        for _ in range(500 if name == "correct" else 100):
            different += (operation(y, frame, backend=run.backend) != first).any(-1).sum()
        assert int(different) == 0, name
    if case.complement != "scalar":
        return
    y.requires_grad_()
    for name in ("correct", "encode"):
        z = operations[name](y, frame, backend=run.backend)
        grad = torch.cos(1e3 * torch.arange(z.shape[1], device=z.device)).to(z).expand_as(z).contiguous()
        (first,) = torch.autograd.grad(z, y, grad, retain_graph=True)
        different = torch.zeros((), dtype=torch.int64, device=run.device)
        for _ in range(100):
            different += (torch.autograd.grad(z, y, grad, retain_graph=True)[0] != first).any(-1).sum()
        assert int(different) == 0, f"gradient of {name}"


FIRST_BACKWARD = """
import torch
from cases import Case, frame_of, rows_of
from aniso_ext import ops

case = Case(264, 32, knots=64, calibrated=True)
y = rows_of(case, 70, torch.bfloat16).cuda().requires_grad_()
spare = [torch.empty_like(y) for _ in range(4)]
for operation in (ops.correct, ops.encode):
    z = operation(y, frame_of(case), backend="cuda")
    grad = torch.ones_like(z)
    spare.clear()
    assert torch.autograd.grad(z, y, grad)[0].isfinite().all()
"""


def test_a_first_backward_finds_no_context_in_its_thread():
    """Autograd's thread is new then, and what memory it wants is there already."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", FIRST_BACKWARD], env=environment, check=True, timeout=120)


@runs(ON_GPU, HALF_AND_SINGLE)
def test_graphs_capture_and_replay_with_other_inputs(run):
    batch = Batch.of(WIDE, 257, run)
    functions = calls(WIDE, batch, run.backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions.values():
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = {name: function() for name, function in functions.items()}
    for seed in (1, 2):
        for value, other in zip(batch, Batch.of(WIDE, 257, run, seed=seed), strict=True):
            value.copy_(other)
        graph.replay()
        for name, function in functions.items():
            assert torch.equal(captured[name], function()), name


@runs(ON_GPU, HALF_AND_SINGLE)
def test_graphs_capture_the_backward(run):
    y = run.rows(WIDE, 129).requires_grad_()
    grad = torch.ones_like(y)

    def backward() -> torch.Tensor:
        return torch.autograd.grad(ops.correct(y, frame_of(WIDE), backend=run.backend), y, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward()
    grad.copy_(run.rows(WIDE, 129, seed=5))
    graph.replay()
    assert torch.equal(captured, backward())


@runs(ON_GPU, ["bfloat16"])
def test_offsets_past_two_to_the_31(run):
    """The last rows lie past element 2^31; the first, the middle and the last are compared."""
    rows = 2**31 // WIDE.width + 777
    free = torch.cuda.mem_get_info()[0]
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free memory, there are {free / 1e9:.0f}")
    y = rows_on(WIDE, rows, run.dtype, run.device)
    assert y.numel() > 2**31
    at = torch.cat([torch.arange(start, start + 300) for start in (0, rows // 2, rows - 300)]).to(run.device)
    frame, backend, sample = frame_of(WIDE), run.backend, y[at].double()

    assert cosine_loss(ops.correct(y, frame, backend=backend)[at], exact := reference("correct", sample)) <= 2e-5
    encoded = ops.encode(y, frame, backend=backend)
    assert relative_error(encoded[at], reference("encode", sample)) <= LOOSE["bfloat16"]
    deltas = deltas_on(WIDE, rows, run.dtype, run.device)
    decoded = ops.decode(encoded, deltas, frame, backend=backend)
    expected = ops.decode(encoded[at].double(), deltas[at].double(), frame, backend="reference")
    assert cosine_loss(decoded[at], expected) <= 2e-5
    del encoded, deltas, decoded

    leaf, leaf_sample = y.requires_grad_(), sample.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.correct(leaf, frame, backend=backend), leaf, y.detach())
    truth = ops.correct(leaf_sample, frame, backend="reference")
    (expected,) = torch.autograd.grad(truth, leaf_sample, sample.detach())
    assert relative_error(gradient[at], expected) <= LOOSE["bfloat16"]
    assert exact.shape == truth.shape


@runs(ON_GPU, ["bfloat16"])
def test_sums_past_two_to_the_31(run):
    rows = 2**31 // WIDE.width + 777
    free = torch.cuda.mem_get_info()[0]
    if free < 20e9:
        pytest.skip(f"needs 20 GB of free memory, there are {free / 1e9:.0f}")
    y = rows_on(WIDE, rows, run.dtype, run.device)
    y[-777:] = -y[-777:]  # rows past element 2^31 that stand out
    found = ops.correct_sums(y, frame_of(WIDE), backend=run.backend)
    parts = [ops.correct_sums(part, frame_of(WIDE), backend=run.backend) for part in y.split(100_000)]
    assert relative_error(found, sum(parts)) <= 128 * 2.0**-24
    exact = sum(reference("correct_sums", part.double()) for part in y[-200_000:].split(50_000))
    assert relative_error(ops.correct_sums(y[-200_000:], frame_of(WIDE), backend=run.backend), exact) <= 6.4e-3


def reference(operator: str, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return getattr(ops, operator)(rows, frame_of(WIDE), backend="reference")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@runs(ON_GPU, HALF_AND_SINGLE)
def test_a_bad_row_makes_the_sums_bad(run, value):
    y = run.rows(SMALL, 200)
    y[77] = value
    assert not ops.correct_sums(y, frame_of(SMALL), backend=run.backend).isfinite().any()


@runs(ON_GPU, ["float32"])
def test_autocast_and_the_default_dtype_change_nothing(run):
    functions = calls(SMALL, Batch.of(SMALL, 100, run), run.backend)
    plain = {name: function() for name, function in functions.items()}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = {name: function() for name, function in functions.items()}
    finally:
        torch.set_default_dtype(before)
    assert [name for name, value in outputs.items() if not torch.equal(value, plain[name])] == []


# Float32 rows whose products may round to TF32 have kernels of their own on Hopper: widths of all their shapes.
TF32_SHAPES = [
    Case(64, 2, knots=9),
    Case(204, 22, knots=64, calibrated=True),
    Case(516, 64, knots=17),
    Case(768, 128, knots=64, calibrated=True),
    Case(1000, 48, knots=64, calibrated=True, basis_dtype="bfloat16"),
    Case(1276, 126, knots=64),
]


@pytest.mark.parametrize("case", **named(TF32_SHAPES))
@runs(ON_GPU, ["tf32"], fewer={"triton": []})
def test_float32_rows_of_any_shape_meet_the_contract_of_tf32(case, run):
    for rows in (1, 65, 1000):
        y = run.rows(case, rows)
        exact = ops.correct(y.double(), frame_of(case), backend="reference")
        found = ops.correct(y, frame_of(case), backend=run.backend)
        assert cosine_loss(found, exact) <= run.cosine_loss
        # products round, but neither what is added to them nor the norms
        assert (found.double().norm(dim=1) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "expanded"])
@runs(ON_GPU, ["tf32"], fewer={"triton": []})
def test_float32_rows_of_any_layout_are_those_of_the_contiguous_copy_at_tf32(layout, run):
    y = run.rows(WIDE, 130)
    wide = torch.empty(130, 2 * WIDE.width + 1, device=run.device)
    spread = {
        "offset": wide[:, 1 : 1 + WIDE.width],  # begins at no multiple of 16 bytes
        "strided": wide[:, : 2 * WIDE.width : 2],
        "transposed": torch.empty(WIDE.width, 130, device=run.device).T,
        "expanded": y[:1].expand(130, -1),
    }[layout]
    if layout == "expanded":
        y = y[:1].repeat(130, 1)
    else:
        spread.copy_(y)
    frame = frame_of(WIDE)
    assert torch.equal(ops.correct(spread, frame, backend=run.backend), ops.correct(y, frame, backend=run.backend))


@pytest.mark.parametrize("kind", ["nan", "inf", "beyond fp16"])
@runs(ON_GPU, ["tf32"], fewer={"triton": []})
def test_a_bad_row_stays_in_its_row_at_tf32(kind, run):
    """A number past 65 504 has no place in fp16: the row comes out as NaN, and as nothing that looks like a row."""
    y, at = run.rows(WIDE, 200), [0, 77, 199]
    clean = ops.correct(y, frame_of(WIDE), backend=run.backend)
    y[at, 5] = {"nan": float("nan"), "inf": float("inf"), "beyond fp16": 7e4}[kind]
    spoilt = ops.correct(y, frame_of(WIDE), backend=run.backend)
    good = [row for row in range(200) if row not in at]
    assert torch.equal(clean[good], spoilt[good])
    on_hopper = run.backend == "cuda" and hopper.serves_correct("cuda:0", torch.float32, WIDE.width, WIDE.rank)
    if kind != "beyond fp16" or on_hopper:
        assert not spoilt[at].isfinite().all(dim=1).any()


@pytest.mark.parametrize("length", [1e-3, 30.0, 1e3])
@runs(ON_GPU, ["tf32"], fewer={"triton": []})
def test_rows_of_other_lengths_meet_the_contract_of_tf32(length, run):
    y = length * run.rows(WIDE, 300)
    exact = ops.correct(y.double(), frame_of(WIDE), backend="reference")
    assert cosine_loss(ops.correct(y, frame_of(WIDE), backend=run.backend), exact) <= run.cosine_loss


@runs(ON_GPU, ["float32"])
def test_the_precision_of_products_is_followed_at_every_call(run):
    """"high" then "highest" on one frame: constants that are kept must not keep the precision."""
    y, frame = run.rows(WIDE, 300), frame_of(WIDE)
    exact = reference("correct", y.double())
    plain = ops.correct(y, frame, backend=run.backend)
    torch.set_float32_matmul_precision("high")  # the fixture sets it back
    assert cosine_loss(ops.correct(y, frame, backend=run.backend), exact) <= 1e-6
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(ops.correct(y, frame, backend=run.backend), plain)
    assert cosine_loss(plain, exact) <= 1e-10
