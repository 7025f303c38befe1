"""The gap simulator: its draws, measured by NumPy from METHOD section 1's definitions, have the constants asked for."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from aniso_ext.errors import InputError
from aniso_ext.worlds import GapWorld, simulate_gap

PAPER = {
    "c_lambda": 0.845,
    "o_q": 0.441,
    "g_mu": 0.392,
    "g_sigma": 0.066,
    "d_center": 1.264,
    "r_res": 0.89,
    "a_r": 28.6,
    "d_eff_ratio": 0.284,
}


def measure(source: np.ndarray, target: np.ndarray, q: int) -> dict[str, float]:
    """METHOD section 1 in float64, written out."""
    x, y = target.astype(np.float64), source.astype(np.float64)
    n, width = x.shape
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    residual = (x - mean_x) - (y - mean_y)
    s_x, s_y, s_r = (rows.T @ rows / n for rows in (x - mean_x, y - mean_y, residual))
    values_x, vectors_x = np.linalg.eigh(s_x)
    values_y, vectors_y = np.linalg.eigh(s_y)
    energy = np.square(residual).sum(axis=1).mean()
    return {
        "c_lambda": float(np.corrcoef(np.log(values_x), np.log(values_y))[0, 1]),
        "o_q": float(np.square(vectors_x[:, -q:].T @ vectors_y[:, -q:]).sum() / q),
        "g_mu": float(np.linalg.norm(mean_x - mean_y)),
        "g_sigma": float(np.linalg.norm(s_x - s_y) / np.linalg.norm(s_x)),
        "d_center": float(energy),
        "r_res": float(energy / np.square(x - y).sum(axis=1).mean()),
        "a_r": float(np.linalg.eigvalsh(s_r)[-1] * width / np.trace(s_r)),
        "d_eff_ratio": float(np.trace(s_r) ** 2 / np.square(s_r).sum() / width),
    }


def assert_within(found: dict[str, float], wanted: dict[str, float], tolerance: float) -> None:
    off = {name: f"{found[name]:.4f} for {value:.4f}" for name, value in wanted.items()}
    far = {name: off[name] for name, value in wanted.items() if abs(found[name] - value) > tolerance * value}
    assert not far, far


@pytest.mark.parametrize(("n", "seed"), [(10_000, 2), (13_000, 1)])
def test_default_world_has_the_paper_constants_on_a_fresh_draw(n: int, seed: int) -> None:
    source, target = simulate_gap(n, seed=seed)
    assert_within(measure(source, target, 128), PAPER, 0.05)


WORLDS = {
    "default constants at width 512": {"width": 512},
    "small": {"small": 128},
    "small, narrow": {"small": 32},
    "small, narrowest": {"small": 24},
    "paired bulk": {"small": 128, "bulk_pairing": 0.2},
    "unlike spectra": {"small": 128, "c_lambda": 0.7},
    "alike spectra": {"small": 128, "c_lambda": 0.98},
    "unlike covariances": {"small": 128, "g_sigma": 0.4},
    "same subspace": {"small": 128, "o_q": 1.0},
    "wide gap": {"small": 128, "g_mu": 0.8},
    "strong pairs": {"small": 128, "d_center": 0.8},
    "means in one cone": {"small": 128, "mean_norm": 0.3},
}


@pytest.mark.parametrize("name", WORLDS)
def test_other_constants_and_widths(name: str) -> None:
    options = dict(WORLDS[name])
    world = GapWorld.small(options.pop("small"), **options) if "small" in options else GapWorld(**options)
    assert world.pairs is not None
    source, target = simulate_gap(world.pairs, world=world, seed=1)
    assert source.shape == target.shape == (world.pairs, world.width)
    assert_within(measure(source, target, world.q), world.constants(), 0.05)


def test_without_pairs_the_population_itself_has_the_constants() -> None:
    world = GapWorld(pairs=None)
    assert_within(world.population_constants(), world.constants(), 1e-3)


@pytest.mark.parametrize("bulk_pairing", [0.0, 0.2])
def test_the_closed_form_of_the_population_is_the_limit_of_large_draws(bulk_pairing: float) -> None:
    world = GapWorld.small(48, pairs=None, bulk_pairing=bulk_pairing)
    n = 200_000
    source, target = simulate_gap(n, world=world, seed=4)
    # Sampling: x~.y~ has a standard deviation below .4, so d_center one below 2 * .4 / sqrt(n) = 1.8e-3; eigenvalues
    # move by sqrt(2/n) = 3e-3; 1e-2 is three times that. A paired bulk is placed to first order in 1/d_eff: 1e-2 more.
    assert_within(measure(source, target, world.q), world.population_constants(), 0.02 if bulk_pairing else 0.01)


def test_no_gap_between_the_means() -> None:
    world = GapWorld.small(64, g_mu=0.0)
    source, target = simulate_gap(4_000, world=world)
    # m_x - m_y is then sampling noise: E||.||² = tr S_r / n
    assert measure(source, target, world.q)["g_mu"] < 2.0 * np.sqrt(1.264 / 4_000)


def test_rows_are_unit_float32() -> None:
    for rows in simulate_gap(500, world=GapWorld.small(100)):
        assert rows.dtype == np.float32
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=0, atol=4 * np.finfo(np.float32).eps)


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    world = GapWorld.small(64)
    long, short = simulate_gap(5_000, world=world, seed=9), simulate_gap(2_500, world=world, seed=9)
    for whole, part in zip(long, short, strict=True):
        # rows of unit norm from a product of length 64, summed in another order
        np.testing.assert_allclose(part, whole[:2_500], rtol=0, atol=64 * np.finfo(np.float32).eps)
    assert [rows.shape for rows in simulate_gap(0, world=world)] == [(0, 64), (0, 64)]


def test_sample_seed_changes_the_rows_and_keeps_the_world() -> None:
    world = GapWorld.small(64)
    n = 4_000
    first, second, third = (simulate_gap(n, world=world, seed=seed)[1].astype(np.float64) for seed in (0, 1, 2))
    assert np.abs(first - second).max() > 0.1
    elsewhere = simulate_gap(n, world=GapWorld.small(64, seed=1), seed=0)[1].astype(np.float64)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a.T @ a - b.T @ b) / np.linalg.norm(a.T @ a))

    same = max(distance(first, second), distance(first, third), distance(second, third))
    assert same < 0.1 < 1.0 < distance(first, elsewhere)


def test_world_seed_turns_the_axes_and_nothing_else() -> None:
    here, there = GapWorld.small(64), GapWorld.small(64, seed=5)
    assert here.population_constants() == there.population_constants()
    gram = [rows @ rows.T for rows in (simulate_gap(50, world=world)[0].astype(np.float64) for world in (here, there))]
    np.testing.assert_allclose(gram[0], gram[1], rtol=0, atol=64 * np.finfo(np.float32).eps)


def test_both_sides_share_their_pairs() -> None:
    """Pairs are more alike than strangers by tr S_xy = 1 - g_mu²/4 - d_center/2, and strangers by nothing."""
    world = GapWorld.small(128)
    source, target = (rows.astype(np.float64) for rows in simulate_gap(4_000, world=world, seed=2))
    source, target = source - source.mean(axis=0), target - target.mean(axis=0)
    paired = np.einsum("ij,ij->i", source, target)
    strangers = np.einsum("ij,ij->i", source, np.roll(target, 1, axis=0))
    error = 4.0 * paired.std() / np.sqrt(4_000)
    assert abs(paired.mean() - (1.0 - 0.25 * 0.392**2 - 0.632)) < error
    assert abs(strangers.mean()) < error


def test_memory_beyond_the_output_does_not_grow_with_rows() -> None:
    world = GapWorld.small(64)
    simulate_gap(1, world=world)
    extra = []
    for n in (8_192, 32_768):
        tracemalloc.start()
        source, target = simulate_gap(n, world=world)
        extra.append(tracemalloc.get_traced_memory()[1] - source.nbytes - target.nbytes)
        tracemalloc.stop()
    block = 2048 * 64 * 4
    assert extra[1] < extra[0] + block
    assert extra[1] < 16 * block


REFUSALS = {
    "r_res against d_center and g_mu": ({"r_res": 0.8}, r"R_res = D_center / \(D_center \+ G_mu²\) = 0\.8916"),
    "more residual than variance": ({"d_center": 1.95}, r"D_center <= tr S_x \+ tr S_y"),
    "means too far apart for their norm": ({"mean_norm": 0.1}, "g_mu/2 <= mean_norm"),
    "anisotropy against participation": ({"a_r": 60.0}, "1/A_r <= d_eff/D <="),
    "anisotropy at a small width": ({"width": 256}, "1/A_r <= d_eff/D <="),
    "anisotropy below one": ({"a_r": 0.5}, "lambda_max is between"),
    "subspaces must meet": ({"width": 200, "q": 100, "o_q": 0.005, "a_r": 14.0}, "max\\(1, 2q - D \\+ 1\\)/q <= O_q"),
    "covariances closer than sampling noise": ({"g_sigma": 0.03}, r"2\(\(tr S_x\)² - E\(x~\.y~\)²\)/n"),
    "covariances closer than turned heads": ({"width": 512, "mean_norm": 0.45, "g_sigma": 0.08}, "lambda_q - lambda_q"),
    "bulk pairs more than all": ({"bulk_pairing": 0.9}, "violates tr S_xy"),
    "nearly identical pairs": ({"d_center": 0.15}, "violates D_center >="),
    "spectra too unlike": ({"c_lambda": 0.1}, "c_lambda = 0.1 cannot be reached"),
    "flatter than the heads": ({"d_eff_ratio": 0.6}, "d_eff_ratio = 0.6"),
    "too few pairs": ({"pairs": 2_000}, "4 x width"),
    "width": ({"width": 8}, "width = 8"),
    "q": ({"width": 128}, "q = 128"),
    "not a number": ({"g_sigma": float("nan")}, "g_sigma = nan"),
    "c_lambda of a correlation above one": ({"c_lambda": 1.2}, "c_lambda = 1.2"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_constants_are_refused_by_name(name: str) -> None:
    options, message = REFUSALS[name]
    with pytest.raises(InputError, match=message):
        GapWorld(**options)
    if name == "width":
        with pytest.raises(InputError, match="at least 24"):
            GapWorld.small(20)


def test_negative_counts_are_refused() -> None:
    for n, seed in ((-1, 0), (1, -1)):
        with pytest.raises(InputError, match="must not be negative"):
            simulate_gap(n, world=GapWorld.small(64), seed=seed)


def test_a_world_is_a_frozen_value() -> None:
    world = GapWorld.small(64)
    assert world == GapWorld.small(64)
    assert hash(world) == hash(GapWorld.small(64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.g_mu = 0.1  # type: ignore[misc]
    assert world.constants()["r_res"] == pytest.approx(1.264 / (1.264 + 0.392**2))
    assert GapWorld.small(64, r_res=0.89).r_res == 0.89


def test_the_package_diagnostics_agree() -> None:
    from aniso_ext.diagnostics import gap

    world = GapWorld.small(128)
    source, target = simulate_gap(world.pairs or 0, world=world, seed=6)
    report = gap(source, target)
    assert report.q == world.q
    found = {name: getattr(report, name) for name in world.constants()}
    assert_within(found, measure(source, target, world.q), 1e-6)
    assert_within(found, world.constants(), 0.05)
