"""RadiusSketch: the stated error against exact quantiles, exact merging, knots that can always be interpolated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext.errors import InputError
from aniso_ext.stats import RadiusSketch

LEVELS = np.array([0, 1e-6, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1 - 1e-6, 1])


def assert_within_bound(sketch: RadiusSketch, values: np.ndarray) -> None:
    want = np.quantile(values.astype(np.float64), LEVELS, axis=0).T
    got = sketch.quantiles(LEVELS)
    # 4 ulps allow for the rounding of the two interpolations being compared.
    assert (np.abs(got - want) <= sketch.relative_error * want + 2.0**-40 + 1e-15 * want).all()
    assert np.array_equal(got[:, 0], values.min(axis=0))
    assert np.array_equal(got[:, -1], values.max(axis=0))


DISTRIBUTIONS = {
    "rayleigh": lambda rng, n: rng.rayleigh(0.1, (n, 3)),
    "twelve decades": lambda rng, n: 10.0 ** rng.uniform(-11, 1, (n, 3)),
    "two far values": lambda rng, n: np.where(rng.random((n, 3)) < 0.5, 0.01, 7.0),
    "heavy ties": lambda rng, n: rng.integers(1, 5, (n, 3)) / 7,
    "powers of two": lambda rng, n: 2.0 ** rng.integers(-10, 3, (n, 3)),
    "just below powers of two": lambda rng, n: np.nextafter(2.0 ** rng.integers(-10, 3, (n, 3)), 0),
    "zeros and ones": lambda rng, n: rng.integers(0, 2, (n, 3)).astype(float),
    "float32 extremes": lambda rng, n: np.where(rng.random((n, 3)) < 0.5, 1.2e-38, 3.4e38),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_quantile_is_within_the_stated_error(name: str, rows: int, dtype: type) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(rows), rows).astype(dtype)
    assert_within_bound(RadiusSketch(3).update(values), values)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e30, allow_subnormal=True), min_size=1, max_size=40),
    precision=st.integers(1, 14),
)
def test_error_bound_holds_for_any_values_and_precision(values: list[float], precision: int) -> None:
    column = np.array(values)[:, None]
    sketch = RadiusSketch(1, precision=precision).update(column)
    assert sketch.relative_error == 2.0**-precision + 2.0**-23
    assert_within_bound(sketch, column)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merging_is_exact_in_any_order(data: st.DataObject, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = [10.0 ** rng.uniform(-14, 3, (size, 2)) for size in [*sizes, 1]]
    whole = RadiusSketch(2, precision=6).update(np.concatenate(shards)).state_dict()
    merged = RadiusSketch(2, precision=6)
    for i in data.draw(st.permutations(range(len(shards)))):
        merged.merge(RadiusSketch(2, precision=6).update(shards[i]))
    state = merged.state_dict()
    assert all(np.array_equal(whole[key], state[key]) for key in whole)


def test_merging_leaves_the_other_sketch_alone() -> None:
    other = RadiusSketch(1).update(np.array([[1.0], [2.0]]))
    merged = RadiusSketch(1).merge(other)
    merged.update(np.array([[1.0]]))
    assert other.count == 2
    assert other.state_dict()["counts"].sum() == 2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("rows", [1, 2, 500])
@pytest.mark.parametrize("knots", [2, 64, 1024])
def test_knots_can_be_interpolated_in_float32(name: str, rows: int, knots: int) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(1), rows)
    table = RadiusSketch(3).update(values).knots(knots)
    assert table.shape == (3, knots)
    assert (table > 0).all()
    assert (np.diff(table, axis=1) > 0).all()
    assert (np.diff(table.astype(np.float32), axis=1) > 0).all()


def test_knots_of_a_constant_radius_surround_it_evenly() -> None:
    table = RadiusSketch(1).update(np.full((5000, 1), 0.3, dtype=np.float32)).knots(1024)[0]
    value = float(np.float32(0.3))
    assert np.abs(table / value - 1).max() < 1024 * 2.0**-22
    assert abs(np.interp(value, table, np.linspace(0, 1, 1024)) - 0.5) < 1e-3


def test_knots_stay_near_the_quantiles_under_heavy_ties() -> None:
    values = np.concatenate([np.full(900, 0.25), np.linspace(0.1, 0.9, 100)])[:, None]
    sketch = RadiusSketch(1).update(values)
    levels = np.sin(0.5 * np.pi * np.arange(1024) / 1023) ** 2
    want = np.quantile(values[:, 0], levels)
    assert np.abs(sketch.knots() / want - 1).max() < sketch.relative_error + 1024 * 2.0**-22


def test_knots_without_ties_are_the_quantiles_at_the_documented_levels() -> None:
    values = np.random.default_rng(2).rayleigh(0.1, (20000, 2))
    sketch = RadiusSketch(2).update(values)
    levels = np.sin(0.5 * np.pi * np.arange(256) / 255) ** 2
    table = sketch.knots(256)
    assert np.array_equal(table, sketch.quantiles(levels))
    assert np.array_equal(table[:, 0], values.min(axis=0))
    assert np.array_equal(table[:, -1], values.max(axis=0))
    assert levels[1] < 1e-4 < levels[128] - levels[127]  # denser in the tails


def test_radius_map_between_scaled_distributions_is_the_scale() -> None:
    rng = np.random.default_rng(8)
    radii = rng.rayleigh(0.1, (50000, 1))
    source, target = RadiusSketch(1).update(radii), RadiusSketch(1).update(1.7 * radii)
    probe = np.quantile(radii, np.linspace(0.01, 0.99, 99))
    mapped = np.interp(probe, source.knots()[0], target.knots()[0])
    assert np.abs(mapped / probe - 1.7).max() < 1.7 * 2.2 * source.relative_error


def test_memory_depends_on_the_range_not_on_the_rows() -> None:
    rng = np.random.default_rng(9)
    sketch = RadiusSketch(2)
    sketch.update(rng.uniform(0.5, 1.0, (100, 2)))
    size = sketch.state_dict()["counts"].nbytes
    for _ in range(20):
        sketch.update(rng.uniform(0.5, 0.999, (1000, 2)))
    assert sketch.state_dict()["counts"].nbytes == size
    assert size == 2 * 8 * (1 + 2048)
    sketch.update(np.zeros((1, 2)))  # a zero goes below the floor, it does not open 40 octaves
    assert sketch.state_dict()["counts"].nbytes == size


def test_state_round_trip_is_exact(tmp_path) -> None:
    rng = np.random.default_rng(10)
    first = RadiusSketch(3).update(rng.rayleigh(0.2, (100, 3)))
    np.savez(tmp_path / "state.npz", **first.state_dict())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        second = RadiusSketch.from_state_dict(dict(state))
    more = rng.rayleigh(0.5, (100, 3))
    assert np.array_equal(first.update(more).knots(), second.update(more).knots())
    empty = RadiusSketch.from_state_dict(RadiusSketch(2).state_dict())
    assert empty.count == 0
    broken = first.state_dict()
    broken["counts"][0, 0] += 1
    with pytest.raises(InputError, match="add up"):
        RadiusSketch.from_state_dict(broken)


@pytest.mark.parametrize("value", [-1e-9, np.nan, np.inf, 1e39])
def test_a_bad_row_is_named_and_nothing_is_kept(value: float) -> None:
    sketch = RadiusSketch(2).update(np.ones((5, 2)))
    before = sketch.state_dict()
    batch = np.ones((4, 2))
    batch[2, 1] = value
    with pytest.raises(InputError, match=r"row 2 of the batch \(row 7 of the stream\)"):
        sketch.update(batch)
    after = sketch.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_negative_zero_is_zero() -> None:
    sketch = RadiusSketch(1).update(np.array([[-0.0], [1.0]]))
    assert sketch.quantiles([0, 1]).tolist() == [[0, 1]]


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(InputError, match="at most 16"):
        RadiusSketch(1, precision=20)
    sketch = RadiusSketch(1)
    with pytest.raises(InputError, match="no radii seen"):
        sketch.knots()
    sketch.update(np.ones((1, 1)))
    with pytest.raises(InputError, match="between 0 and 1"):
        sketch.quantiles([1.5])
    with pytest.raises(InputError, match="at least 2 knots"):
        sketch.knots(1)
    with pytest.raises(InputError, match="cannot merge"):
        sketch.merge(RadiusSketch(1, precision=4))
