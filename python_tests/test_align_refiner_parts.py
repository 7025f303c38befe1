"""Stage II piece by piece: every formula against NumPy float64, the bounds against an adversarial refiner."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext import ops
from aniso_ext.align.prior.wrapped_normal import score, wrap
from aniso_ext.align.refiner import Bounds, Refiner, effective_bound, similarity_guarantee
from aniso_ext.align.refiner.bounds import BoundSurvey, CollapseWatch
from aniso_ext.align.refiner.losses import (
    bounded_update,
    complement_directions,
    complement_objective,
    phase_consistency,
    sliced_wasserstein,
    sorted_distance,
)
from aniso_ext.align.refiner.passes import Passes
from aniso_ext.align.refiner.polar import wrapped_score
from aniso_ext.errors import InputError

WIDTH, BLOCKS, KNOTS = 20, 4, 16
RANK = 2 * BLOCKS
ORDERS = pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])


def frame_of(seed: int, complement: str = "scalar", center: bool = False, calibrated: bool = False) -> ops.Frame:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0]
    arrays = {
        "source_mean": 0.2 * rng.standard_normal(WIDTH),
        "target_mean": 0.2 * rng.standard_normal(WIDTH),
        "basis": basis,
        "radius_source_knots": np.sort(rng.uniform(0.05, 1, (BLOCKS, KNOTS))),
        "radius_target_knots": np.sort(rng.uniform(0.05, 1, (BLOCKS, KNOTS))),
        "complement_scale": rng.uniform(0.5, 1.5, 1 if complement == "scalar" else WIDTH),
    }
    if calibrated:
        arrays["output_mean"] = 0.1 * rng.standard_normal(WIDTH)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return ops.Frame.from_tensors(tensors, complement=complement, center=center)


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(oracle.unit(np.random.default_rng(seed).standard_normal((count, WIDTH)) + 0.3))


def wild_refiner(seed: int, scale: float, bounds: Bounds, literal: bool) -> Refiner:
    """A refiner of float64 with random weights of any size: its deltas are anything from tiny to saturated."""
    refiner = Refiner(BLOCKS, WIDTH, bounds=bounds, literal=literal, hidden=24, layers=2, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in refiner.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        refiner.input_mean.normal_(generator=generator)
        refiner.input_std.uniform_(0.1, 3, generator=generator)
    return refiner


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


# The network


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


# Tensors


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


# Bounds


@pytest.mark.parametrize(("a_theta", "a_rho"), [(0.1, 0.1), (0.0, 0.3), (0.7, 0.0), (3.0, 1.0), (4.0, 0.5)])
def test_kappa_is_the_largest_move_of_a_block(a_theta: float, a_rho: float) -> None:
    turns = np.linspace(-a_theta, a_theta, 2001)
    stretches = np.array([-a_rho, 0.0, a_rho])
    moves = np.abs(np.exp(stretches[:, None] + 1j * turns) - 1)
    # the grid of turns misses the furthest point by at most half a step
    assert Bounds(a_theta, a_rho, 0).kappa == pytest.approx(moves.max(), rel=1e-5, abs=1e-15)
    assert Bounds(a_theta, a_rho, 0).kappa >= moves.max() * (1 - 1e-15)


@pytest.mark.parametrize("values", [(-0.1, 0.1, 0.1), (0.1, math.nan, 0.1), (0.1, 0.1, math.inf), (0.1, True, 0.1)])
def test_impossible_bounds_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match=r"a_(theta|rho|v) must be"):
        Bounds(*values)


@ORDERS
@pytest.mark.parametrize("complement", ["scalar", "diagonal"])
def test_effective_bound_is_its_definition(literal: bool, complement: str) -> None:
    frame = frame_of(8, complement)
    arrays = {name: value.numpy() for name, value in frame.tensors().items()}
    rows = rows_of(30, 9)
    refiner = wild_refiner(10, 1.0, Bounds(0.1, 0.2, 0.05), literal)
    state = ops.encode(rows, frame)
    deltas = refiner(state).detach()
    rho, theta, v0 = oracle.initialise(rows.numpy(), arrays, complement)
    basis, outside = arrays["basis"], np.eye(WIDTH) - arrays["basis"] @ arrays["basis"].T
    coordinates = np.empty((30, RANK))
    coordinates[:, 0::2], coordinates[:, 1::2] = rho * np.cos(theta), rho * np.sin(theta)
    move = deltas[:, RANK:].numpy()
    step = 0.05 * np.tanh(move @ outside) if literal else 0.05 * np.tanh(move) @ outside
    kappa = math.sqrt((math.exp(0.2) - 1) ** 2 + 4 * math.exp(0.2) * math.sin(0.05) ** 2)
    length = np.linalg.norm(coordinates @ basis.T + v0, axis=1)
    expected = (kappa * np.linalg.norm(coordinates, axis=1) + np.linalg.norm(step, axis=1)) / length
    eps = effective_bound(state, deltas, frame, refiner.bounds, literal=literal)
    assert np.abs(eps.numpy() - expected).max() <= 1e-12
    survey = BoundSurvey()
    survey.update(eps[:11])
    survey.update(eps[11:])
    report = survey.report()
    assert report.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert report.largest == pytest.approx(expected.max(), rel=1e-12)
    # the sketch's stated relative error
    assert report.median == pytest.approx(np.median(expected), rel=2.0**-11 + 2.0**-22)
    assert report.guarantee == similarity_guarantee(report.largest)


def test_the_guarantee_is_capped_where_it_says_nothing() -> None:
    assert similarity_guarantee(0.0) == 0
    assert similarity_guarantee(0.1) == pytest.approx(4 * 0.1 / 0.9, rel=1e-15)
    assert similarity_guarantee(0.9) == similarity_guarantee(1.0) == similarity_guarantee(7.0) == 2


@ORDERS
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e6]),
    a_theta=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    a_rho=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    a_v=st.sampled_from([0.0, 0.005, 0.02, 0.2]),
    complement=st.sampled_from(["scalar", "diagonal", "diagonal_projected"]),
    center=st.booleans(),
)
def test_no_refiner_leaves_the_bounds(
    literal: bool, seed: int, scale: float, a_theta: float, a_rho: float, a_v: float, complement: str, center: bool
) -> None:
    frame = frame_of(seed, complement, center)
    rows = rows_of(24, seed + 1)
    bounds = Bounds(a_theta, a_rho, a_v)
    refiner = wild_refiner(seed, scale, bounds, literal)
    state = ops.encode(rows, frame)
    deltas = refiner(state).detach()
    options = {"a_theta": a_theta, "a_rho": a_rho, "a_v": a_v, "literal": literal}
    # what decode rebuilds, read back from the rows: its length is free, so it is taken from the parts
    arrays = {name: value.numpy() for name, value in frame.tensors().items()}
    outside = np.eye(WIDTH) - arrays["basis"] @ arrays["basis"].T
    update = bounded_update(state, deltas, frame.basis, bounds, literal=literal)
    rho0, theta0, v0 = oracle.initialise(rows.numpy(), arrays, complement, center)
    turn = np.angle(np.exp(1j * (update.theta.numpy() - theta0)))
    ratio = update.log_radius.exp().numpy() / rho0
    move = update.move.numpy()
    step = move if literal else move @ outside
    rounding = 1e-12
    assert np.abs(turn).max() <= min(a_theta, math.pi) + rounding
    assert ratio.max() <= math.exp(a_rho) * (1 + rounding) and ratio.min() >= math.exp(-a_rho) * (1 - rounding)
    assert np.abs(move).max() <= a_v * (1 + rounding)
    rebuilt = oracle.rebuild(rho0 * ratio, theta0 + turn, v0 + step, arrays)
    decoded = ops.decode(state, deltas, frame, **options).numpy()
    # an error of the sums is enlarged where almost nothing is left of a row; none of these rows is that short
    assert np.abs(decoded - rebuilt).max() <= 1e-9
    # paper A.4, for every pair of rows
    eps = effective_bound(state, deltas, frame, bounds, literal=literal)
    limit = similarity_guarantee(float(eps.max()))
    before = ops.decode(state, torch.zeros_like(deltas), frame, **options).numpy()
    assert np.abs(decoded @ decoded.T - before @ before.T).max() <= limit + rounding
    one, other = np.meshgrid(eps.numpy(), eps.numpy())
    inside = np.maximum(one, other) < 1
    pairwise = 2 * (one + other) / np.where(inside, 1 - np.maximum(one, other), 1)
    assert (np.abs(decoded @ decoded.T - before @ before.T) <= pairwise + rounding)[inside].all()


# Losses


def double_loop(turn: np.ndarray, radius: np.ndarray, edges: np.ndarray, literal: bool) -> float:
    """Paper eq. (9), edge by edge."""
    pairs = [(i, j) for i in range(len(edges)) for j in range(i) if edges[i, j]]
    losses = []
    for d, rho in zip(turn, radius, strict=True):
        total = sum(rho[i] * rho[j] for i, j in pairs)
        loss = sum(rho[i] * rho[j] / total * (1 - math.cos(d[i] - d[j])) for i, j in pairs)
        losses.append(loss / len(pairs) if literal else loss)
    return float(np.mean(losses))


def adjacency_of(seed: int, share: float) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((BLOCKS + 3, BLOCKS + 3)) < share, 1)
    upper[0, 1] = True
    return (upper | upper.T).astype(np.float64)


@ORDERS
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_phase_consistency_is_the_loop_over_edges(literal: bool, share: float, size: float) -> None:
    rng = np.random.default_rng(11)
    edges = adjacency_of(12, share)
    turn, radius = size * rng.standard_normal((9, len(edges))), rng.uniform(0.01, 1, (9, len(edges)))
    expected = double_loop(turn, radius, edges, literal)
    turn_t, radius_t, edges_t = (torch.from_numpy(a) for a in (turn, radius, edges))
    result = float(phase_consistency(turn_t, radius_t, edges_t, literal=literal))
    # the loop subtracts cosines from 1, which is good to 1e-16 absolutely
    assert result == pytest.approx(expected, rel=1e-10, abs=1e-15)
    single = float(phase_consistency(turn_t.float(), radius_t.float(), edges_t, literal=literal))
    assert single == pytest.approx(expected, rel=2e-5)


def test_a_common_turn_and_a_graph_without_edges_cost_nothing() -> None:
    radius = torch.rand(5, 6, dtype=torch.float64) + 0.1
    edges = torch.ones(6, 6, dtype=torch.float64) - torch.eye(6, dtype=torch.float64)
    turn = torch.full((5, 6), 0.3, dtype=torch.float64)
    assert abs(float(phase_consistency(turn, radius, edges))) <= 1e-15
    for literal in (False, True):
        assert float(phase_consistency(torch.randn(5, 6).double(), radius, 0 * edges, literal=literal)) == 0


def test_phase_consistency_has_the_gradient_of_the_loop() -> None:
    edges = torch.from_numpy(adjacency_of(13, 0.5))
    radius = torch.rand(3, len(edges), dtype=torch.float64) + 0.1
    turn = (0.2 * torch.randn(3, len(edges), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: phase_consistency(t, radius, edges), (turn,))


def test_directions_are_unit_vectors_of_the_complement() -> None:
    frame = frame_of(14)
    directions = complement_directions(frame.basis, 4000, torch.Generator().manual_seed(0))
    assert float((frame.basis.T @ directions).abs().max()) <= 1e-14
    assert float((directions.norm(dim=0) - 1).abs().max()) <= 1e-14
    # uniform on the sphere of V: E w w^T = (I - QQ^T)/(D - R); an entry's variance is at most 3/(D - R)^2
    second = (directions @ directions.T).numpy() / 4000
    outside = np.eye(WIDTH) - frame.basis.numpy() @ frame.basis.numpy().T
    deviation = math.sqrt(3) / (WIDTH - RANK) / math.sqrt(4000)
    assert np.abs(second - outside / (WIDTH - RANK)).max() <= 5 * deviation


def test_sliced_wasserstein_is_the_sorted_difference() -> None:
    rng = np.random.default_rng(15)
    source, target = rng.standard_normal((40, 5)), 2 * rng.standard_normal((40, 5)) + 1
    expected = np.mean([np.mean((np.sort(source[:, p]) - np.sort(target[:, p])) ** 2) for p in range(5)])
    result = float(sliced_wasserstein(torch.from_numpy(source), torch.from_numpy(target)))
    assert result == pytest.approx(expected, rel=1e-14)
    assert float(sliced_wasserstein(torch.from_numpy(source), torch.from_numpy(source[::-1].copy()))) == 0
    with pytest.raises(InputError, match="needs samples of one size"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))


@pytest.mark.parametrize("scale", [0.03, 0.2, 0.7, 1.5])
def test_the_score_relative_to_the_nearest_image_is_the_score(scale: float) -> None:
    shift = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
    scales = torch.full((2001, 1), scale, dtype=torch.float64)
    expected = score(wrap(shift), scales)
    assert float((wrapped_score(shift, scales) - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    single = wrapped_score(shift.float(), scales.float()).double()
    # the rounding of an angle of 9, twice, times the steepest slope: pi^2/s^4 where two images weigh alike
    assert float((single - expected).abs().max()) <= 18 * 2.0**-23 * (1 / scale**2 + math.pi**2 / scale**4)


def test_the_sorted_distance_brings_its_gradient() -> None:
    rng = np.random.default_rng(24)
    source = torch.from_numpy(rng.standard_normal((30, 4))).requires_grad_()
    target = torch.from_numpy(2 * rng.standard_normal((30, 4)) + 1)
    expected = sliced_wasserstein(source, target)
    distance, pull = sorted_distance(source.detach(), target)
    torch.testing.assert_close(distance, expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(pull, torch.autograd.grad(expected, source)[0], rtol=1e-14, atol=1e-16)


@ORDERS
def test_complement_objective_is_its_formula(literal: bool) -> None:
    frame = frame_of(16)
    rng = np.random.default_rng(17)
    rows, target = rows_of(32, 18), rows_of(32, 19)
    state = ops.encode(rows, frame)
    deltas = torch.from_numpy(rng.standard_normal((32, RANK + WIDTH)))
    update = bounded_update(state, deltas, frame.basis, Bounds(0.1, 0.1, 0.05), literal=literal)
    directions = complement_directions(frame.basis, 6, torch.Generator().manual_seed(1))
    arrays = {name: value.numpy() for name, value in frame.tensors().items()}
    outside = np.eye(WIDTH) - arrays["basis"] @ arrays["basis"].T
    v0 = oracle.initialise(rows.numpy(), arrays, "scalar")[2]
    move = deltas[:, RANK:].numpy()
    bounded = 0.05 * np.tanh(move @ outside if literal else move)
    v = v0 + (bounded if literal else bounded @ outside)
    distances = [
        np.mean((np.sort(v @ w) - np.sort((target.numpy() @ outside) @ w)) ** 2) for w in directions.numpy().T
    ]
    expected = ((WIDTH - RANK) * np.mean(distances) + 0.1 * np.mean((bounded**2).sum(axis=1))) / 0.7
    assert float(complement_objective(update, target, directions, 0.7)) == pytest.approx(expected, rel=1e-12)


def test_moving_the_complement_costs_its_length_squared() -> None:
    # in the scale of the objective an offset m of V costs |m|^2, whatever D - R is
    frame = frame_of(20)
    state = ops.encode(rows_of(64, 21), frame)
    update = bounded_update(state, torch.zeros(64, RANK + WIDTH).double(), frame.basis, Bounds(0.1, 0.1, 0.05))
    offset = torch.randn(WIDTH, dtype=torch.float64)
    offset = offset - frame.basis @ (frame.basis.T @ offset)
    directions = complement_directions(frame.basis, 20_000, torch.Generator().manual_seed(2))
    cost = float(complement_objective(update, update.v0 + offset, directions, 1.0))
    # mean of P squared cosines times D - R: relative deviation sqrt(2/P)
    assert cost == pytest.approx(float(offset @ offset), rel=5 * math.sqrt(2 / 20_000))


def test_update_needs_no_derivative_of_the_phase_at_a_zero_radius() -> None:
    frame = frame_of(22)
    # a row whose recentred coordinates are all zero: every phase is that of the origin
    rows = (frame.source_mean - frame.target_mean)[None].clone()
    state = ops.encode(rows, frame)
    deltas = torch.zeros(1, RANK + WIDTH, dtype=torch.float64, requires_grad=True)
    update = bounded_update(state, deltas, frame.basis, Bounds(0.1, 0.1, 0.02))
    (update.theta.sin().sum() + update.log_radius.sum()).backward()
    assert bool(torch.isfinite(deltas.grad).all())


# Collapse watch


def test_collapse_watch_compares_concentrations() -> None:
    rng = np.random.default_rng(23)
    theta0, turn = rng.uniform(-np.pi, np.pi, (5000, 3)), np.zeros((5000, 3))
    # block 0 is pulled onto one phase, block 1 stays as it is, block 2 is as concentrated as the target
    turn[:, 0] = -theta0[:, 0] * 0.9
    theta0[:, 2] *= 0.1
    target = torch.tensor([0.05, 0.05, 0.99])
    watch = CollapseWatch(target, 4000)
    for part in np.split(np.arange(5000), [100, 1700]):
        watch.update(*(torch.from_numpy(a[part]) for a in (np.sin(theta0), np.cos(theta0), turn)))
    report = watch.report()
    assert np.abs(report.initial.numpy() - np.abs(np.exp(1j * theta0).mean(0))).max() <= 1e-12
    assert np.abs(report.refined.numpy() - np.abs(np.exp(1j * (theta0 + turn)).mean(0))).max() <= 1e-12
    assert report.collapsed.tolist() == [True, False, False]
    assert "1 of 3 blocks beyond the target's (worst: block 0" in report.warning()
    assert report.summary()["collapsed_blocks"] == 1


def test_what_was_concentrated_before_is_no_collapse() -> None:
    theta0 = torch.full((1000, 2), 0.4).double()
    watch = CollapseWatch(torch.zeros(2), 1000)
    watch.update(theta0.sin(), theta0.cos(), torch.zeros_like(theta0))
    assert watch.report().warning() is None
