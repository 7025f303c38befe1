"""The planted world: its laws against their closed forms, and what both stages recover of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from aniso_ext.align.prior import PhaseGraph, PhasePrior, PriorOptions, fit_prior
from aniso_ext.align.refiner import RefinedMap, RefinementOptions, fit_refiner
from aniso_ext.align.rows import open_rows
from aniso_ext.align.training import TrainingOptions
from aniso_ext.errors import InputError
from aniso_ext.ops import correct
from aniso_ext.stats import PhaseMoments
from aniso_ext.worlds.gap import simulate_gap
from aniso_ext.worlds.planted import PlantedRows, PlantedWorld, resultant

WORLD = PlantedWorld()
ROWS = 6000
PRIOR = PriorOptions(partners=4, connected=True, width=96, blocks=2)
PRIOR_TRAINING = TrainingOptions(steps=400, batch_rows=512, learning_rate=5e-3, patience=0, evaluate_every=200)
REFINER_TRAINING = TrainingOptions(steps=200, batch_rows=512, patience=0, evaluate_every=200)


def wrapped(angle: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * angle))


def phase_error(world: PlantedWorld, rows: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.abs(wrapped(world.phases_of(rows) - truth)).mean())


def chance(count: int, rows: int) -> float:
    """What one of ``count`` means of ``rows`` unit complex numbers is off by with probability 1e-4 at most.

    P(|error| > t) <= 4 exp(-rows t^2/4): Hoeffding's bound for either part at t/sqrt(2), both signs.
    """
    return math.sqrt(4 * math.log(4 * count / 1e-4) / rows)


@pytest.fixture(scope="module")
def rows() -> PlantedRows:
    return WORLD.draw(ROWS, seed=0)


@pytest.mark.parametrize("world", [WORLD, PlantedWorld(spread=0.8, anchor=3.0, seed=5)])
def test_moments_of_the_phases_are_the_closed_forms(world: PlantedWorld) -> None:
    moments = PhaseMoments(world.blocks).update(world.draw(20_000, seed=3).phases)
    assert np.abs(moments.first - world.first).max() < chance(16, 20_000)
    assert np.abs(moments.second - world.second).max() < chance(120, 20_000)
    # the closed forms are not all zero or one, so the comparison says something
    assert 0.3 < np.abs(world.first).max() < 0.9 and np.abs(world.second - np.eye(16)).max() > 0.4


def test_resultant_is_the_mean_direction_of_a_von_mises_law() -> None:
    angle = (np.arange(20_000) + 0.5) * 2 * np.pi / 20_000 - np.pi
    for kappa in (0.1, 1.0, 30.0, 1000.0):
        weight = np.exp(kappa * (np.cos(angle) - 1))
        expected = (weight * np.cos(angle)).sum() / weight.sum()  # the rectangle rule is exact for periodic functions
        assert resultant(np.array([kappa]))[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("twist", ["offsets", "jitter", "common", "none"])
def test_rows_are_unit_and_hold_phases_radii_and_twist(twist: str, rows: PlantedRows) -> None:
    world = replace(WORLD, twist=twist)
    drawn = world.draw(500, seed=0)
    assert drawn.source.dtype == np.float32 and drawn.source.shape == (500, world.width)
    basis = world.basis
    assert np.abs(basis.T @ basis - np.eye(32)).max() < 1e-12
    for part in (drawn.source, drawn.target):
        assert np.abs(np.linalg.norm(part.astype(np.float64), axis=1) - 1).max() < 1e-6
    # float32 rows of radii above 0.05 give phases to about 1e-7/0.05
    assert np.abs(wrapped(world.phases_of(drawn.target) - drawn.phases)).max() < 1e-5
    assert np.abs(wrapped(world.phases_of(drawn.source) - drawn.phases - drawn.twist)).max() < 1e-5
    energy = [np.square(part.astype(np.float64) @ basis) for part in (drawn.source, drawn.target)]
    for part, share in zip(energy, (world.source_share, world.share), strict=True):
        assert np.abs(part[:, 0::2] + part[:, 1::2] - share * drawn.radii**2).max() < 1e-6
    assert np.abs(drawn.twist).max() == (0 if twist == "none" else world.bound)
    group_sums = [drawn.twist[:, world.group_of == g].sum(axis=1) for g in range(world.groups)]
    assert (np.abs(group_sums).max() < 1e-12) == (twist != "common")
    assert (np.ptp(drawn.twist, axis=0).max() > 0) == (twist == "jitter")
    # the target does not depend on the twist
    assert np.array_equal(drawn.phases, WORLD.draw(500, seed=0).phases)


def test_the_complement_is_the_gap_simulators(rows: PlantedRows) -> None:
    inside = 2 * WORLD.blocks
    axes = WORLD._axes[:, inside:]
    source, target = simulate_gap(ROWS, world=WORLD._gap, seed=0)
    for part, expected, share in ((rows.source, source, 0.7), (rows.target, target, 0.8)):
        assert np.abs(part @ axes / math.sqrt(1 - share) - expected).max() < 1e-5


def test_unpaired_sides_hold_the_same_rows_in_orders_that_say_nothing(rows: PlantedRows) -> None:
    source, target = rows.unpaired(seed=1)
    for mixed, ordered in ((source, rows.source), (target, rows.target)):
        assert {row.tobytes() for row in mixed} == {row.tobytes() for row in ordered}
    pairs = [(rows.source, rows.target), (source, target), (rows.source[1:], rows.target[:-1])]
    paired, shuffled, strangers = (float((y * x).sum(axis=1).mean()) for y, x in pairs)
    # the cosine of two rows deviates by less than 0.5, the mean over 6000 by less than 0.0065: four of each
    assert paired > 0.7 and shuffled == pytest.approx(strangers, abs=4 * math.sqrt(2) * 0.0065)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups must be an integer of at least 1, got 0"),
        ({"twist": "random"}, "twist must be one of offsets, jitter, common, none, got 'random'"),
        ({"spread": 0.0}, "spread and evenness must be positive"),
        ({"share": 1.0}, "share 1.0 and source_share 0.7 must lie between 0 and 1"),
    ],
)
def test_impossible_worlds_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlantedWorld(**change)


def test_recall_of_weak_couplings_is_that_of_the_threshold() -> None:
    """100 pairs of coupling A = .25 among 200 blocks at 300 rows: threshold sqrt(ln(200^2/.02)/300) = .22.

    The estimate is A plus complex noise of variance (1 - A^2)/n, a share p of which passes the threshold. The pairs are
    independent, so recall is p to four binomial deviations; a false edge has a probability of 1 % at most in all.
    """
    kappa = next(k for k in np.linspace(0.3, 0.8, 501) if resultant(np.array([k]))[0] >= 0.25)
    world = PlantedWorld(groups=100, size=2, spread=1 / math.sqrt(kappa), anchor=0.0)
    moments = PhaseMoments(200).update(world.draw(300, seed=0).phases)
    graph = PhaseGraph.from_moments(moments, torch.ones(200))
    found, planted = ({tuple(edge) for edge in edges.tolist()} for edges in (graph.edges, world.edges))
    noise = np.random.default_rng(0).standard_normal((100_000, 2)) @ np.array([1, 1j]) / math.sqrt(2)
    passing = np.abs(0.25 + math.sqrt((1 - 0.25**2) / 300) * noise) > math.sqrt(math.log(200**2 / 0.02) / 300)
    expected = passing.mean()
    assert 0.6 < expected < 0.95
    precision, recall = len(found & planted) / len(found), len(found & planted) / len(planted)
    assert precision == 1
    assert recall == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 100))


def fitted_prior(target: np.ndarray, steps: int) -> PhasePrior:
    frame = WORLD.frame(WORLD.draw(50, seed=0).source, target)  # an uncentred prior reads the basis alone
    return fit_prior(open_rows(target, "target"), frame, replace(PRIOR_TRAINING, steps=steps), PRIOR)[0]


@pytest.fixture(scope="module")
def prior(rows: PlantedRows) -> PhasePrior:
    return fitted_prior(rows.unpaired()[1], PRIOR_TRAINING.steps)


def test_stage_one_recovers_graph_and_offsets(prior: PhasePrior) -> None:
    """Connected couplings inside groups are at least r(100)^2 (1 - r(1)^2) = .79, the threshold is .04.

    Precision: a false edge has a probability of 1 % at most. Recall: the weakest is 50 deviations above the threshold.
    """
    connected = np.abs(WORLD.second - np.outer(WORLD.first, WORLD.first.conj()))
    weakest = connected[tuple(WORLD.edges.T)].min()
    assert weakest > 0.78 and math.sqrt(math.log(16**2 / 0.02) / ROWS) < 0.04
    assert prior.graph.edges.tolist() == WORLD.edges.tolist()
    edges = WORLD.edges
    offset = prior.graph.offset.numpy()[edges[:, 0], edges[:, 1]]
    planted = WORLD.offsets[edges[:, 0]] - WORLD.offsets[edges[:, 1]]
    assert np.abs(wrapped(offset - planted)).max() < chance(24, ROWS) / weakest


def errors(world: PlantedWorld, prior: PhasePrior, training: TrainingOptions = REFINER_TRAINING) -> tuple[float, float]:
    """Mean absolute phase error of held-out rows at the initialisation and after Stage II with its defaults."""
    source, target = world.draw(ROWS, seed=0).unpaired()
    held_out = world.draw(2000, seed=1)
    frame = world.frame(source, target)
    refiner, _ = fit_refiner(
        open_rows(source, "source"), open_rows(target, "target"), frame, prior, RefinementOptions(), training
    )
    given = torch.from_numpy(held_out.source)
    initial, refined = correct(given, frame), RefinedMap(refiner)(given, frame)
    return phase_error(world, initial, held_out.phases), phase_error(world, refined, held_out.phases)


def test_stage_two_undoes_the_offsets(prior: PhasePrior) -> None:
    initial, refined = errors(WORLD, prior)
    # recentring undoes part of the twist of the groups that have an anchor, and so a mean
    assert 0.08 < initial <= 0.1
    assert refined < initial / 2


@pytest.mark.filterwarnings("ignore:the refiner has concentrated the phases")
def test_without_the_couplings_the_offsets_stay(rows: PlantedRows) -> None:
    # a score of zero makes L_II independent of theta^, and L_Phi is least where it starts: no number of steps moves it
    untrained = errors(WORLD, fitted_prior(rows.target, 0), replace(REFINER_TRAINING, steps=50))
    assert untrained[1] == pytest.approx(untrained[0], abs=1e-5)
    rng = np.random.default_rng(0)
    phases = np.stack([rng.permutation(column) for column in rows.phases.T], axis=1)
    outside = simulate_gap(ROWS, world=WORLD._gap, seed=0)[1]
    shuffled = fitted_prior(WORLD.build(rows.radii, phases, outside, WORLD.share), PRIOR_TRAINING.steps)
    initial, refined = errors(WORLD, shuffled)
    assert shuffled.graph.edges.tolist() == [] and refined > 0.9 * initial


@pytest.mark.parametrize("twist", ["common", "jitter"])
@pytest.mark.filterwarnings("ignore:the refiner has concentrated the phases")
def test_what_the_density_does_not_see_stays(twist: str, prior: PhasePrior) -> None:
    """The limits that the module states: a common turn of a group, and a twist drawn anew for each row."""
    initial, refined = errors(replace(WORLD, twist=twist), prior)
    assert refined > 0.9 * initial
