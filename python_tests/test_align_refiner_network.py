"""The refiner against NumPy float64 and autograd, its folded form and its tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refiner_worlds import BLOCKS, ORDERS, RANK, WIDTH, frame_of, rows_of, wild_refiner

from aniso_ext import ops
from aniso_ext.align.refiner import Bounds, Refiner
from aniso_ext.align.refiner.passes import Passes, column_sums
from aniso_ext.errors import InputError


def numpy_refiner(refiner: Refiner, state: np.ndarray) -> np.ndarray:
    """The network written out: standardise, residual layers with the exact GELU, linear output."""
    weights = {name: value.detach().double().numpy() for name, value in refiner.state_dict().items()}
    erf = np.vectorize(math.erf)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + erf(x / math.sqrt(2))) / 2

    x = (state - weights["input_mean"]) / weights["input_std"]
    h = gelu(x @ weights["first.weight"].T + weights["first.bias"])
    for layer in range(len(refiner.hidden)):
        h = h + gelu(h @ weights[f"hidden.{layer}.weight"].T + weights[f"hidden.{layer}.bias"])
    return h @ weights["last.weight"].T + weights["last.bias"]


def test_network_is_the_written_out_map() -> None:
    refiner = wild_refiner(3, 0.3, Bounds(0.1, 0.1, 0.02), literal=False)
    state = np.random.default_rng(0).standard_normal((7, 3 * BLOCKS + WIDTH))
    expected = numpy_refiner(refiner, state)
    result = refiner(torch.from_numpy(state)).detach().numpy()
    assert np.abs(result - expected).max() <= 1e-13 * np.abs(expected).max()


@ORDERS
def test_folding_changes_nothing_but_rounding(literal: bool) -> None:
    frame = frame_of(1, calibrated=True)
    refiner = wild_refiner(4, 0.3, Bounds(0.1, 0.1, 0.02), literal)
    state = ops.encode(rows_of(50, 2), frame)
    plain, folded = refiner(state).detach(), refiner.fold(frame.basis)(state)
    limit = 1e-12 * float(plain.abs().max())
    assert float((folded[:, :RANK] - plain[:, :RANK]).abs().max()) <= limit
    basis = frame.basis.numpy()
    moves = plain[:, RANK:].numpy()
    if literal:
        moves = moves @ (np.eye(WIDTH) - basis @ basis.T)
        assert np.abs(folded[:, RANK:].numpy() @ basis).max() <= limit
    assert np.abs(folded[:, RANK:].numpy() - moves).max() <= limit
    options = {"a_theta": 0.1, "a_rho": 0.1, "a_v": 0.02, "literal": literal}
    rows = ops.decode(state, folded, frame, **options)
    assert float((rows - ops.decode(state, plain, frame, **options)).abs().max()) <= 1e-11
    if literal:
        assert float((ops.decode(state, folded, frame, **options, projected=True) - rows).abs().max()) <= 1e-13
    assert all(not parameter.requires_grad for parameter in refiner.fold(frame.basis).parameters())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_projected_moves_are_taken_as_they_are(backend: str) -> None:
    frame = frame_of(3, calibrated=True)
    state = ops.encode(rows_of(20, 3), frame)
    deltas = torch.from_numpy(np.random.default_rng(4).standard_normal((20, RANK + WIDTH)))
    basis = frame.basis
    inside = torch.cat((deltas[:, :RANK], deltas[:, RANK:] - deltas[:, RANK:] @ basis @ basis.T), dim=1)
    options = {"a_v": 0.2, "literal": True, "backend": backend}
    expected = ops.decode(state, deltas, frame, **options)
    assert float((ops.decode(state, inside, frame, **options, projected=True) - expected).abs().max()) <= 1e-14
    assert float((ops.decode(state, deltas, frame, **options, projected=True) - expected).abs().max()) > 1e-3
    with pytest.raises(InputError, match="projected=True goes with literal=True"):
        ops.decode(state, deltas, frame, projected=True)


def test_an_untrained_refiner_is_the_closed_form() -> None:
    frame = frame_of(2, calibrated=True)
    refiner = Refiner(BLOCKS, WIDTH, bounds=Bounds(0.1, 0.1, 0.02)).double()
    rows = rows_of(40, 5)
    state = ops.encode(rows, frame)
    for network in (refiner, refiner.fold(frame.basis)):
        deltas = network(state)
        assert torch.equal(deltas, torch.zeros_like(deltas))
        # log and exp of a radius round once each
        difference = (ops.decode(state, deltas, frame) - ops.correct(rows, frame)).detach()
        assert float(difference.abs().max()) <= 8 * 2.0**-52


def test_first_weights_are_a_function_of_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = (Refiner(BLOCKS, WIDTH, bounds=Bounds(0.1, 0.1, 0.02), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.first.weight, two.first.weight)
    assert not torch.equal(one.first.weight, other.first.weight)


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("chunk_rows", [4, 9], ids=["in chunks", "at once"])
def test_passes_that_are_written_out_have_the_gradients_of_autograd(layers: int, chunk_rows: int) -> None:
    refiner = Refiner(RANK // 2, WIDTH, hidden=12, layers=layers, bounds=Bounds(0.1, 0.1, 0.1)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in refiner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() / 3
    state = torch.randn(9, 3 * RANK // 2 + WIDTH, generator=generator).double()
    grad = torch.randn(9, RANK + WIDTH, generator=generator).double()
    kept = refiner(state)
    expected = torch.autograd.grad(kept, list(refiner.parameters()), grad)
    passes = Passes(refiner, torch.float64, chunk_rows)
    anew, between = passes.forward(passes.standardised(state))
    gradients = passes.backward(between, grad)
    torch.testing.assert_close(anew, kept, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_constant_columns_are_not_blown_up() -> None:
    refiner = Refiner(BLOCKS, WIDTH, bounds=Bounds(0.1, 0.1, 0.02))
    std = torch.full((3 * BLOCKS + WIDTH,), 0.25)
    std[3] = 1e-9
    refiner.standardise(torch.zeros_like(std), std)
    assert refiner.input_std[3] == 1 and float(refiner.input_std.min()) == 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_over_rows_need_no_scratch_memory_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = torch.randn(8192, 2560, generator=torch.Generator().manual_seed(5)).to("cuda", dtype)
    column_sums(rows, torch.float32)  # workspaces of the library
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = column_sums(rows, torch.float32)
    assert torch.cuda.max_memory_allocated() - before <= 2**17  # the ones and the sums
    # 8192 terms added in any order: each addition rounds a partial sum, which is below the sum of the magnitudes
    magnitudes = rows.double().abs().sum(dim=0)
    assert bool(((sums.double() - rows.double().sum(dim=0)).abs() <= 2**-24 * 8192**0.5 * 4 * magnitudes).all())


def test_tensors_restore_the_refiner() -> None:
    refiner = wild_refiner(6, 0.5, Bounds(0.2, 0.05, 0.01), literal=True).float()
    tensors = refiner.tensors()
    assert all(name.startswith("refiner.") for name in tensors)
    again = Refiner.from_tensors({**tensors, "basis": torch.eye(3)}, blocks=BLOCKS, width=WIDTH)
    assert (again.bounds, again.literal, len(again.hidden)) == (refiner.bounds, True, 2)
    state = torch.randn(5, 3 * BLOCKS + WIDTH)
    assert torch.equal(again(state), refiner(state))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("first.weight", None, "refiner.first.weight is missing"),
        ("hidden.0.bias", None, "refiner.hidden.0.bias is missing"),
        ("bounds", None, "refiner.bounds is missing"),
        ("projects_first", None, "refiner.projects_first is missing"),
        ("bounds", lambda t: t[:2], r"refiner.bounds has shape \[2\], expected \[3\]"),
        ("bounds", lambda t: -t, "refiner.bounds: a_theta must be between 0 and 10, got -0.1"),
        ("bounds", lambda t: t * math.nan, "refiner.bounds has 3 non-finite values"),
        ("projects_first", lambda t: t.int(), "refiner.projects_first is torch.int32, expected torch.bool"),
        ("first.weight", lambda t: t[0], "refiner.first.weight must be"),
        ("first.weight", lambda t: t[:, 1:], r"refiner.first.weight has shape \[24, 31\], expected \[24, 32\]"),
        ("last.weight", lambda t: t.double(), "refiner.last.weight is torch.float64, expected torch.float32"),
        ("last.bias", lambda t: t / 0, "refiner.last.bias has .* non-finite values"),
        ("input_std", lambda t: t * 0, "refiner.input_std must be positive"),
        ("extra", lambda t: torch.ones(1), "unknown refiner.extra"),
    ],
)
def test_damaged_tensors_are_named(name: str, change: object, message: str) -> None:
    tensors = wild_refiner(7, 0.5, Bounds(0.1, 0.1, 0.02), literal=False).float().tensors()
    value = tensors.pop(f"refiner.{name}", None)
    if change is not None:
        tensors[f"refiner.{name}"] = change(value)
    with pytest.raises(InputError, match=message):
        Refiner.from_tensors(tensors, blocks=BLOCKS, width=WIDTH)
