"""The operators as PyTorch sees them: schemas, fakes, autograd registration, and torch.compile without recompiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cases import BRANCHES, Case, calibrated, frame_of, rows_of
from devices import KERNELS, Run, runs, widest
from torch.utils._python_dispatch import TorchDispatchMode

from aniso_ext import ops
from aniso_ext.ops import backends
from aniso_ext.ops.schemas import NAMESPACE

CASE = calibrated(Case(30, 6, knots=9))
OPERATORS = ("correct", "correct_backward", "encode", "encode_backward", "decode", "decode_backward")
LEAVES = {"correct": 1, "encode": 1, "decode": 2}


class Recorder(TorchDispatchMode):
    """Keeps the last call of each of the package's operators, under its name without that of the backend."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.calls: dict[str, tuple[object, tuple[object, ...]]] = {}
        self._backend = backend

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == NAMESPACE:
            assert not kwargs
            self.calls[name.removeprefix(f"{self._backend}_")] = (function, args)
        return function(*args, **(kwargs or {}))


def recorded(operator: str, run: Run, case: Case, rows: int = 5) -> tuple[object, tuple[object, ...]]:
    """The operator behind a public operation, and its arguments; leaves that can have gradients ask for them."""
    frame, y, deltas = frame_of(case), run.rows(case, rows), run.deltas(case, rows)
    kind = operator.removesuffix("_backward")
    leaves = [ops.encode(y, frame, backend=run.backend), deltas] if kind == "decode" else [y]
    leaves = [leaf.requires_grad_(kind in LEAVES) for leaf in leaves]
    # in one thread, so that the recorder sees the backward of a GPU as well
    with torch.autograd.set_multithreading_enabled(False), Recorder(run.backend) as recorder:
        z = getattr(ops, kind)(*leaves, frame, backend=run.backend)
        if operator != kind:
            torch.autograd.grad(z, leaves, torch.ones_like(z))
    if operator == "correct_sums" and operator not in recorder.calls:
        pytest.skip(f"backend {run.backend!r} has no operator for {operator}")
    function, found = recorder.calls[operator]
    found = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in found)
    for leaf in found[: LEAVES.get(operator, 0)]:
        leaf.requires_grad_()
    return function, found


@pytest.mark.parametrize("operator", [*OPERATORS, "correct_sums"])
@runs(KERNELS, fewer={"triton": ("float32", "bfloat16")})
def test_opcheck(operator, run):
    function, arguments = recorded(operator, run, CASE)
    results = torch.library.opcheck(function, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", ["correct", "encode", "decode"])
@runs(KERNELS, ["float32"])
def test_opcheck_without_calibration_and_with_both_widths_of_operands(operator, run):
    case = replace(BRANCHES[4], width=18, rank=4)
    assert case.complement == "diagonal_projected" and not case.calibrated
    torch.library.opcheck(*recorded(operator, run, case))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rows", [0, 1])
@runs(KERNELS, ["float32"])
def test_fakes_give_the_shapes_strides_and_dtypes_of_the_kernels(operator, rows, run):
    function, arguments = recorded(operator, run, CASE, rows)
    inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    real = function(*inputs)
    fake = function(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs))
    real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
    described = [[(z.shape, z.stride(), z.dtype) for z in outputs] for outputs in (real, fake)]
    assert described[0] == described[1]


@pytest.mark.parametrize("operator", ["correct", "encode"])
@runs(["cpu", "cuda"], ["float32"])
def test_kernels_refuse_constants_that_do_not_fit(operator, run):
    """The operators are public to torch, so that a wrong constant must raise and never be read past its end."""
    function, (y, *constants) = recorded(operator, run, CASE)
    for position, constant in enumerate(constants):
        if not isinstance(constant, torch.Tensor):
            continue
        shorter = [constant[:-1].contiguous()] if len(constant) > 1 else []
        for wrong in (constant.double(), *shorter):
            with pytest.raises(RuntimeError):
                function(y, *constants[:position], wrong, *constants[position + 1 :])


@runs(["cpu", "cuda"], ["float32"])
def test_decode_refuses_constants_that_do_not_fit(run):
    decode, (state, deltas, basis, shift, *bounds) = recorded("decode", run, CASE)
    for wrong in (
        (state, deltas, basis.double(), shift),
        (state, deltas, basis[:, :-1].contiguous(), shift),
        (state, deltas, basis[:-1].contiguous(), shift),
        (state, deltas, basis, shift[:-1].contiguous()),
        (state, deltas, basis, shift.double()),
        (state, deltas[:, :-1], basis, shift),
        (state, deltas[:-1], basis, shift),
        (state, deltas.double(), basis, shift),
    ):
        with pytest.raises(RuntimeError):
            decode(*wrong, *bounds)


def functions(frame: ops.Frame, backend: str = "auto") -> dict[str, object]:
    def decode(y: torch.Tensor, deltas: torch.Tensor, **options: bool) -> torch.Tensor:
        return ops.decode(ops.encode(y, frame, backend=backend), deltas, frame, backend=backend, **options).sin()

    return {
        "correct": lambda y, deltas: ops.correct(2 * y, frame, backend=backend).sin(),
        "encode": lambda y, deltas: ops.encode(2 * y, frame, backend=backend).sin(),
        "decode": decode,
        "decode_literal": lambda y, deltas: decode(y, deltas, literal=True),
    }


def fresh_frame(case: Case) -> ops.Frame:
    """A frame that has not been used: tracing must fold it."""
    return frame_of(case).with_output_mean(frame_of(case).output_mean)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def marked(tensor: torch.Tensor) -> torch.Tensor:
    torch._dynamo.mark_dynamic(tensor, 0)
    return tensor


@pytest.mark.parametrize("name", ["correct", "encode", "decode", "decode_literal"])
@runs(KERNELS, ["float32"])
def test_one_graph_serves_every_batch_size_with_gradients(name, run, counter):
    function = functions(fresh_frame(CASE), run.backend)[name]
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (7, 2, 33, 300):
        y, deltas = run.rows(CASE, rows), run.deltas(CASE, rows)
        results = []
        for either in (function, compiled):
            leaves = marked(y.clone().requires_grad_()), marked(deltas.clone().requires_grad_())
            z = either(*leaves)
            z.square().sum().backward()
            results.append((z.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)))
        for eager, ours in zip(*results, strict=True):
            # aot_eager runs the same kernels on the same values; only 2 * y and sin stand around them
            assert torch.equal(eager, ours)
    assert counter.frame_count == 1


@runs(KERNELS, ["float32"])
def test_a_second_size_without_marks_costs_one_dynamic_graph_and_no_more(run, counter):
    compiled = torch.compile(functions(fresh_frame(CASE), run.backend)["correct"], fullgraph=True, backend=counter)
    for rows in (4, 9, 17, 64):
        compiled(run.rows(CASE, rows), None)
    assert counter.frame_count == 2


@runs(KERNELS, ["float32"])
def test_a_graph_is_never_reused_for_another_frame(run, counter):
    """Constants are read at call time: frames that differ in values alone must give their own results."""

    def function(y: torch.Tensor, frame: ops.Frame) -> torch.Tensor:
        return ops.correct(y, frame, backend=run.backend)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    y = run.rows(CASE, 6)
    frames = [fresh_frame(CASE), fresh_frame(replace(CASE, seed=1)), fresh_frame(CASE).with_output_mean(None)]
    for frame in [*frames, *frames]:
        assert torch.equal(compiled(y, frame), function(y, frame))
    assert counter.frame_count <= len(frames)


@runs(KERNELS, ["float32"])
def test_other_uses_of_a_frame_do_not_recompile(run, counter):
    frame = fresh_frame(CASE)
    compiled = torch.compile(functions(frame, run.backend)["correct"], fullgraph=True, backend=counter)
    y = run.rows(CASE, 6)
    first = compiled(y, None)
    for other in (torch.float16, torch.bfloat16, *([] if run.backend == "triton" else [torch.float64])):
        ops.correct(y.to(other), frame, backend=run.backend)
    assert torch.equal(compiled(y, None), first) and counter.frame_count == 1


@runs(KERNELS)
def test_every_format_compiles(run, counter):
    frame = fresh_frame(CASE)

    def function(y: torch.Tensor) -> torch.Tensor:
        return ops.correct(y, frame, backend=run.backend)

    y = run.rows(CASE, 6)
    assert torch.equal(torch.compile(function, fullgraph=True, backend=counter)(y), function(y))


def test_the_reference_compiles(counter):
    frame = fresh_frame(CASE)
    compiled = torch.compile(lambda y: ops.correct(y, frame, backend="reference"), fullgraph=True, backend=counter)
    y = rows_of(CASE, 6)
    assert torch.allclose(compiled(y), ops.correct(y, frame, backend="reference"), rtol=0, atol=30 * 2.0**-52)


@widest(KERNELS)
def test_inductor_code_around_the_operators_agrees(run):
    torch._dynamo.reset()
    frame = fresh_frame(CASE)

    def function(y: torch.Tensor) -> torch.Tensor:
        return ops.correct(y * 2, frame, backend=run.backend).sin()

    leaves = [run.rows(CASE, 6).requires_grad_() for _ in range(2)]
    for either, y in zip((function, torch.compile(function, fullgraph=True)), leaves, strict=True):
        either(y).square().sum().backward()
    torch._dynamo.reset()
    # sin of another library: a few units in the last place of numbers below 10
    assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=0, atol=450 * run.eps)


def test_the_backend_is_chosen_while_tracing(counter, monkeypatch):
    monkeypatch.setenv("ANISO_BACKEND", "reference")
    frame = fresh_frame(CASE)
    torch.compile(lambda y: ops.correct(y, frame), fullgraph=True, backend=counter)(rows_of(CASE, 6))
    assert not frame._operands, "the reference needs no folded operands"
    assert backends.resolve("auto", torch.empty(0), frame).name == "reference"
