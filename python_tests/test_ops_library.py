"""The operators as PyTorch sees them: schemas, fakes, autograd registration, and torch.compile without recompiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cases import BRANCHES, Case, calibrated, deltas_of, frame_of, rows_of

from aniso_ext import ops
from aniso_ext.ops import backends, native

CASE = calibrated(Case(30, 6, knots=9))
OPERATORS = ("correct", "correct_backward", "encode", "encode_backward", "decode", "decode_backward")


def arguments(operator: str, case: Case, dtype: torch.dtype, rows: int = 5) -> tuple[object, ...]:
    """Arguments of an operator in schema order; leaves that can have gradients ask for them."""
    frame = frame_of(case)
    y = rows_of(case, rows, dtype)
    state, deltas = ops.encode(y, frame, backend="cpu"), deltas_of(case, rows, dtype)
    constants = native._folded(y, frame)
    grad = torch.ones(rows, case.width, dtype=dtype)
    bounds = (0.1, 0.1, 0.02, True)
    match operator:
        case "correct":
            return y.requires_grad_(), *constants.initialisation(), constants.shift
        case "correct_backward":
            return grad, y, *constants.initialisation(), constants.shift
        case "encode":
            return y.requires_grad_(), *constants.initialisation()
        case "encode_backward":
            return torch.ones_like(state), y, *constants.initialisation()
        case "decode":
            return state.requires_grad_(), deltas.requires_grad_(), constants.basis, constants.shift, *bounds
    return grad, state, deltas, constants.basis, constants.shift, *bounds


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(operator, dtype):
    overload = getattr(torch.ops.aniso_ext, operator).default
    results = torch.library.opcheck(overload, arguments(operator, CASE, dtype))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", ["correct", "encode", "decode"])
def test_opcheck_without_calibration_and_with_both_widths_of_operands(operator):
    case = replace(BRANCHES[4], width=18, rank=4)
    assert case.complement == "diagonal_projected" and not case.calibrated
    torch.library.opcheck(getattr(torch.ops.aniso_ext, operator).default, arguments(operator, case, torch.float32))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rows", [0, 1])
def test_fakes_give_the_shapes_strides_and_dtypes_of_the_kernels(operator, rows):
    function = getattr(torch.ops.aniso_ext, operator)
    inputs = tuple(
        x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(operator, CASE, torch.float32, rows)
    )
    real = function(*inputs)
    fake = function(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs))
    real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
    described = [[(z.shape, z.stride(), z.dtype) for z in outputs] for outputs in (real, fake)]
    assert described[0] == described[1]


@pytest.mark.parametrize("operator", ["correct", "encode"])
def test_kernels_refuse_constants_that_do_not_fit(operator):
    """The operators are public to torch, so that a wrong constant must raise and never be read past its end."""
    y, *constants = arguments(operator, CASE, torch.float32)
    function = getattr(torch.ops.aniso_ext, operator)
    for position, constant in enumerate(constants):
        if not isinstance(constant, torch.Tensor):
            continue
        shorter = [constant[:-1].contiguous()] if len(constant) > 1 else []
        for wrong in (constant.double(), *shorter):
            with pytest.raises(RuntimeError):
                function(y, *constants[:position], wrong, *constants[position + 1 :])


def test_decode_refuses_constants_that_do_not_fit():
    state, deltas, basis, shift, *bounds = arguments("decode", CASE, torch.float32)
    decode = torch.ops.aniso_ext.decode
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


def functions(frame: ops.Frame) -> dict[str, object]:
    return {
        "correct": lambda y, deltas: ops.correct(2 * y, frame).sin(),
        "encode": lambda y, deltas: ops.encode(2 * y, frame).sin(),
        "decode": lambda y, deltas: ops.decode(ops.encode(y, frame), deltas, frame).sin(),
        "decode_literal": lambda y, deltas: ops.decode(ops.encode(y, frame), deltas, frame, literal=True).sin(),
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
def test_one_graph_serves_every_batch_size_with_gradients(name, counter):
    function = functions(fresh_frame(CASE))[name]
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (7, 2, 33, 300):
        y, deltas = rows_of(CASE, rows, torch.float32), deltas_of(CASE, rows, torch.float32)
        results = []
        for run in (function, compiled):
            leaves = marked(y.clone().requires_grad_()), marked(deltas.clone().requires_grad_())
            z = run(*leaves)
            z.square().sum().backward()
            results.append((z.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)))
        for eager, ours in zip(*results, strict=True):
            # aot_eager runs the same kernels on the same values; only 2 * y and sin stand around them
            assert torch.equal(eager, ours)
    assert counter.frame_count == 1


def test_a_second_size_without_marks_costs_one_dynamic_graph_and_no_more(counter):
    compiled = torch.compile(functions(fresh_frame(CASE))["correct"], fullgraph=True, backend=counter)
    for rows in (4, 9, 17, 64):
        compiled(rows_of(CASE, rows, torch.float32), None)
    assert counter.frame_count == 2


def test_a_graph_is_never_reused_for_another_frame(counter):
    """Constants are read at call time: frames that differ in values alone must give their own results."""
    compiled = torch.compile(lambda y, frame: ops.correct(y, frame), fullgraph=True, backend=counter)
    y = rows_of(CASE, 6, torch.float32)
    frames = [fresh_frame(CASE), fresh_frame(replace(CASE, seed=1)), fresh_frame(CASE).with_output_mean(None)]
    for frame in [*frames, *frames]:
        assert torch.equal(compiled(y, frame), ops.correct(y, frame))
    assert counter.frame_count <= len(frames)


def test_other_uses_of_a_frame_do_not_recompile(counter):
    frame = fresh_frame(CASE)
    compiled = torch.compile(functions(frame)["correct"], fullgraph=True, backend=counter)
    y = rows_of(CASE, 6, torch.float32)
    first = compiled(y, None)
    ops.correct(y.double(), frame), ops.correct(y.bfloat16(), frame)
    assert torch.equal(compiled(y, None), first) and counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_compiles(dtype, counter):
    frame = fresh_frame(CASE)
    compiled = torch.compile(lambda y: ops.correct(y, frame), fullgraph=True, backend=counter)
    y = rows_of(CASE, 6, dtype)
    assert torch.equal(compiled(y), ops.correct(y, frame))


def test_the_reference_compiles(counter):
    frame = fresh_frame(CASE)
    compiled = torch.compile(lambda y: ops.correct(y, frame, backend="reference"), fullgraph=True, backend=counter)
    y = rows_of(CASE, 6)
    assert torch.allclose(compiled(y), ops.correct(y, frame, backend="reference"), rtol=0, atol=30 * 2.0**-52)


def test_inductor_code_around_the_operators_agrees():
    torch._dynamo.reset()
    frame = fresh_frame(CASE)

    def function(y: torch.Tensor) -> torch.Tensor:
        return ops.correct(y * 2, frame).sin()

    leaves = [rows_of(CASE, 6).requires_grad_() for _ in range(2)]
    for run, y in zip((function, torch.compile(function, fullgraph=True)), leaves, strict=True):
        run(y).square().sum().backward()
    torch._dynamo.reset()
    # sin of another library: a few units in the last place of numbers below 10
    assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-13)


def test_the_backend_is_chosen_while_tracing(counter, monkeypatch):
    monkeypatch.setenv("ANISO_BACKEND", "reference")
    frame = fresh_frame(CASE)
    torch.compile(lambda y: ops.correct(y, frame), fullgraph=True, backend=counter)(rows_of(CASE, 6))
    assert not frame._operands, "the reference needs no folded operands"
    assert backends.resolve("auto", torch.empty(0), frame).name == "reference"
