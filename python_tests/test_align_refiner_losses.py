"""Losses of Stage II, each against NumPy float64 or autograd."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from refiner_worlds import BLOCKS, ORDERS, RANK, WIDTH, frame_of, rows_of

from aniso_ext import ops
from aniso_ext.align.prior.wrapped_normal import score, wrap
from aniso_ext.align.refiner import Bounds
from aniso_ext.align.refiner.losses import (
    bounded_update,
    complement_directions,
    complement_objective,
    phase_consistency,
    sliced_wasserstein,
    sorted_distance,
)
from aniso_ext.align.refiner.polar import wrapped_score
from aniso_ext.errors import InputError


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
    distances = [np.mean((np.sort(v @ w) - np.sort((target.numpy() @ outside) @ w)) ** 2) for w in directions.numpy().T]
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
