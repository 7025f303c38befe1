"""Bounds of Stage II against an adversarial refiner, and the watch over collapse."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refiner_worlds import ORDERS, RANK, WIDTH, frame_of, rows_of, wild_refiner

from aniso_ext import ops
from aniso_ext.align.refiner import Bounds, effective_bound, similarity_guarantee
from aniso_ext.align.refiner.bounds import BoundSurvey, CollapseWatch
from aniso_ext.align.refiner.losses import (
    bounded_update,
)
from aniso_ext.errors import InputError


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
