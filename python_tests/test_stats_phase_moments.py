"""PhaseMoments against direct complex averages and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext.errors import InputError
from aniso_ext.stats import PhaseMoments


def test_matches_the_definition() -> None:
    theta = np.random.default_rng(0).uniform(-np.pi, np.pi, (700, 4))
    moments = PhaseMoments(4)
    for batch in np.array_split(theta, 6):
        moments.update(batch)
    first = np.exp(1j * theta).mean(axis=0)
    second = np.exp(1j * (theta[:, :, None] - theta[:, None, :])).mean(axis=0)
    assert np.abs(moments.first - first).max() < 1e-14
    assert np.abs(moments.second - second).max() < 1e-14
    assert np.abs(moments.connected() - (second - np.outer(first, first.conj()))).max() < 1e-14


def test_wrapped_normal_closed_form() -> None:
    # E e^{i theta} = e^{i mu - s^2/2}; independent phases have no connected coupling, locked ones have all of it.
    rng = np.random.default_rng(1)
    free = 0.7 + 0.5 * rng.standard_normal((200_000, 1))
    other = -0.3 + 0.5 * rng.standard_normal((200_000, 1))
    moments = PhaseMoments(3).update(np.hstack([free, other, free + 0.4]))
    noise = 5 / np.sqrt(200_000)
    assert abs(moments.first[0] - np.exp(0.7j - 0.125)) < noise
    assert abs(moments.connected()[0, 1]) < noise
    assert abs(moments.second[2, 0] - np.exp(0.4j)) < 1e-12  # theta_2 - theta_0 = 0.4
    assert abs(moments.connected()[2, 0] - np.exp(0.4j) * (1 - np.exp(-0.25))) < noise


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (np.float32, 1e-7), (np.float16, 1e-3)])
def test_cosine_and_sine_are_the_same_as_angles(dtype: type, tolerance: float) -> None:
    theta = np.random.default_rng(2).uniform(-np.pi, np.pi, (50, 3))
    by_angle = PhaseMoments(3).update(theta)
    by_direction = PhaseMoments(3).update((np.cos(theta).astype(dtype), np.sin(theta).astype(dtype)))
    assert np.abs(by_angle.second - by_direction.second).max() < tolerance
    assert np.abs(np.diag(by_direction.second) - 1).max() < 1e-14


@settings(max_examples=30, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_merging_in_any_order_agrees(data: st.DataObject, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = [rng.uniform(-4, 4, (size, 3)) for size in [*sizes, 1]]
    whole = PhaseMoments(3).update(np.concatenate(shards))
    merged = PhaseMoments(3)
    for i in data.draw(st.permutations(range(len(shards)))):
        merged.merge(PhaseMoments(3).update(shards[i]))
    assert merged.count == whole.count
    assert np.abs(merged.first - whole.first).max() < 1e-13
    assert np.abs(merged.second - whole.second).max() < 1e-13


def test_state_round_trip_is_exact() -> None:
    theta = np.random.default_rng(3).uniform(-3, 3, (20, 2))
    moments = PhaseMoments(2).update(theta[:10])
    restored = PhaseMoments.from_state_dict(moments.state_dict())
    assert np.array_equal(moments.update(theta[10:]).second, restored.update(theta[10:]).second)


def test_refusals_name_the_row_and_keep_nothing() -> None:
    moments = PhaseMoments(2).update(np.zeros((3, 2)))
    bad = np.zeros((4, 2))
    bad[1, 0] = np.nan
    with pytest.raises(InputError, match=r"row 1 of the batch \(row 4 of the stream\) is not finite"):
        moments.update(bad)
    with pytest.raises(InputError, match=r"row 0 .* has cos\^2 \+ sin\^2 different from 1"):
        moments.update((np.zeros((1, 2)), np.zeros((1, 2))))
    with pytest.raises(InputError, match="cos has 1 rows and sin 2"):
        moments.update((np.ones((1, 2)), np.zeros((2, 2))))
    assert moments.count == 3
    assert moments.first.tolist() == [1, 1]
    with pytest.raises(InputError, match="no phases seen"):
        _ = PhaseMoments(2).first
    with pytest.raises(InputError, match="cannot merge"):
        moments.merge(PhaseMoments(3))
