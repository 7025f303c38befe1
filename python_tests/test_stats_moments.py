"""Moments: one pass against exact and two-pass oracles, merging in any order, refusals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext.errors import InputError
from aniso_ext.stats import Moments, fit_moments
from aniso_ext.stats import batches as batches_module


def two_pass(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population covariance in extended precision."""
    rows = rows.astype(np.longdouble)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, np.einsum("ni,nj->ij", centred, centred) / len(rows)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 257])
def test_matches_two_pass_in_extended_precision(dtype: type, rows: int) -> None:
    data = np.random.default_rng(rows).standard_normal((rows, 5)).astype(dtype)
    moments = Moments(5)
    for start in range(0, rows, 50):
        moments.update(data[start : start + 50])
    mean, covariance = two_pass(data)
    assert moments.count == rows
    assert np.abs(moments.mean - mean).max() < 1e-15 * 4
    assert np.abs(moments.covariance - covariance).max() < 1e-14
    assert moments.trace == pytest.approx(float(np.trace(covariance)), abs=1e-14)
    assert np.allclose(moments.std, np.sqrt(np.diag(covariance).astype(float)), atol=1e-14)


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-9])
def test_mean_of_a_thousand_with_tiny_variance_loses_nothing(spread: float) -> None:
    # Stored values are what is measured, so the oracle sees the same quantised rows.
    rng = np.random.default_rng(3)
    data = 1e3 + spread * rng.standard_normal((4000, 6))
    moments = fit_moments(np.array_split(data, 37))
    mean, covariance = two_pass(data)
    assert np.abs((moments.mean - mean).astype(float)).max() <= 2.3e-13  # two ulps of 1e3
    # The sum-of-squares formula would have an error of 1e6 * 2^-53 / spread^2, that is 1e-4 to 1e8.
    assert relative(moments.covariance, covariance) < 1e-10


def test_matches_exact_rational_arithmetic() -> None:
    rng = np.random.default_rng(4)
    data = 1e3 + 1e-7 * rng.standard_normal((60, 2))
    exact = [[Fraction(float(value)) for value in row] for row in data]
    mean = [sum(row[d] for row in exact) / 60 for d in range(2)]
    cross = sum((row[0] - mean[0]) * (row[1] - mean[1]) for row in exact) / 60
    scale = sum((row[0] - mean[0]) ** 2 for row in exact) / 60
    moments = fit_moments([data[:1], data[1:7], data[7:]])
    assert abs(Fraction(float(moments.covariance[0, 1])) - cross) / scale < Fraction(1, 10**12)
    assert abs(Fraction(float(moments.mean[0])) - mean[0]) < Fraction(1, 10**12)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=8),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_shards_merge_in_any_order(data: st.DataObject, sizes: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 2]
    # Sorted shards with different means and scales are the hard case for an update formula.
    shards = [offset + 10.0 ** rng.uniform(-5, 0) * rng.standard_normal((size, 3)) + i for i, size in enumerate(sizes)]
    whole = np.concatenate(shards)
    mean, covariance = two_pass(whole)
    accumulators = [Moments(3).update(shards[i]) for i in data.draw(st.permutations(range(len(shards))))]
    while len(accumulators) > 1:
        other = accumulators.pop(data.draw(st.integers(0, len(accumulators) - 1)))
        accumulators[data.draw(st.integers(0, len(accumulators) - 1))].merge(other)
    merged = accumulators[0]
    assert merged.count == len(whole)
    assert float(np.abs(merged.mean - mean).max()) < 1e-10
    assert float(np.abs(merged.covariance - covariance).max()) < 1e-10 * max(1.0, float(np.abs(covariance).max()))


def test_large_batches_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(5).standard_normal((1000, 4)) + 50
    whole = Moments(4).update(data)
    monkeypatch.setattr(batches_module, "CHUNK_BYTES", 8 * 4 * 7)
    assert relative(Moments(4).update(data).covariance, whole.covariance) < 1e-13
    data[993, 2] = np.nan
    with pytest.raises(InputError, match=r"row 993 of the batch \(row 1003 of the stream\) is not finite"):
        Moments(4).update(data[:10]).update(data)


def test_diagonal_keeps_only_the_variances() -> None:
    data = np.random.default_rng(6).standard_normal((500, 4)) * [1e-3, 1, 10, 0] + 1e3
    full, diagonal = Moments(4), Moments(4, diagonal=True)
    for batch in np.array_split(data, 9):
        full.update(batch)
        diagonal.merge(Moments(4, diagonal=True).update(batch))
    assert relative(diagonal.variance, np.diag(full.covariance)) < 1e-13
    assert diagonal.variance[3] == 0
    assert diagonal.trace == pytest.approx(full.trace, rel=1e-13)
    with pytest.raises(InputError, match="diagonal=True"):
        _ = diagonal.covariance
    with pytest.raises(InputError, match="cannot merge"):
        full.merge(diagonal)


def test_state_round_trip_is_exact(tmp_path) -> None:
    data = np.random.default_rng(7).standard_normal((300, 5)).astype(np.float32)
    first = fit_moments([data[:100]])
    np.savez(tmp_path / "state.npz", **first.state_dict())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        second = Moments.from_state_dict(dict(state))
    first.update(data[100:])
    second.update(data[100:])
    assert np.array_equal(first.mean, second.mean)
    assert np.array_equal(first.covariance, second.covariance)


def test_a_saved_state_is_independent_of_the_accumulator() -> None:
    moments = Moments(2).update(np.ones((3, 2)))
    state = moments.state_dict()
    restored = Moments.from_state_dict(state)
    moments.update(np.zeros((3, 2)))
    assert restored.count == 3
    assert restored.mean.tolist() == [1, 1]
    assert state["mean_high"].tolist() == [1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200, 1.7e308])
def test_a_rejected_batch_leaves_the_state_as_it_was(value: float) -> None:
    moments = Moments(2).update(np.array([[1.0, 2.0], [3.0, 5.0]]))
    before = moments.state_dict()
    with pytest.raises(InputError):
        moments.update(np.array([[0.0, 1.0], [value, -1.0], [-value, -1.0], [value, 0.0]]))
    after = moments.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_refusals_name_what_is_wrong() -> None:
    moments = Moments(4)
    with pytest.raises(InputError, match=r"\[n, 4\], got \[2, 3\]"):
        moments.update(np.zeros((2, 3)))
    with pytest.raises(InputError, match="got int64"):
        moments.update(np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(InputError, match=r"got \[4\]"):
        moments.update(np.zeros(4))
    with pytest.raises(InputError, match="no rows seen"):
        _ = moments.mean
    with pytest.raises(InputError, match="no batches"):
        fit_moments([])
    with pytest.raises(InputError, match="positive integer"):
        Moments(0)
    state = moments.state_dict()
    with pytest.raises(InputError, match="scatter has shape"):
        Moments.from_state_dict({**state, "scatter": np.zeros(4)})
    with pytest.raises(InputError, match="keys"):
        Moments.from_state_dict({"width": 4})


def test_empty_batches_count_for_nothing() -> None:
    moments = Moments(3).update(np.zeros((0, 3))).update(np.ones((2, 3))).merge(Moments(3))
    assert moments.count == 2
    assert moments.covariance.tolist() == np.zeros((3, 3)).tolist()


def test_real_embeddings_stream_to_the_two_pass_result(real_data) -> None:
    rows = np.load(real_data / "fashion44k" / "text.npy", mmap_mode="r", allow_pickle=False)[:12000]
    moments = fit_moments(rows[start : start + 700] for start in range(0, len(rows), 700))
    exact = rows.astype(np.float64)
    mean = exact.mean(axis=0)
    assert np.abs(moments.mean - mean).max() < 1e-13
    assert np.abs(moments.covariance - (exact - mean).T @ (exact - mean) / len(exact)).max() < 1e-13
