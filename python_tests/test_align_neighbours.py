"""Stand-ins made of target rows, against sorting by NumPy; and arms that never meet their own target row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aniso_ext.align import make_aligner
from aniso_ext.align.neighbours import NeighbourMean
from aniso_ext.errors import InputError
from aniso_ext.mllm import Correction
from aniso_ext.mllm.arms import choose_arms
from aniso_ext.mllm.arms.ladder import strangers


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def sides(rows: int = 300, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Two cones about different means."""
    random = np.random.default_rng(0)
    spread = np.linspace(1, 0.2, width)
    source = unit(random.standard_normal((rows, width)) * spread + np.eye(width)[0] * 2)
    return source, unit(random.standard_normal((rows, width)) * spread + np.eye(width)[1] * 2)


def expected(standins: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    cosines = unit(standins - standins.mean(axis=0)) @ unit(target - target.mean(axis=0)).T
    nearest = np.argsort(-cosines, axis=1)[:, :count]
    return unit(target[nearest].sum(axis=1))


@pytest.mark.parametrize("count", [1, 5])
def test_neighbours_are_those_by_direction_from_the_means(count: int) -> None:
    source, target = sides()
    found = Correction.nearest(source, target, neighbours=count)(torch.from_numpy(source))
    # rows and means are held in float32: an error of some 1e-7, which does not swap neighbours of these 300 rows
    np.testing.assert_allclose(found.numpy(), expected(source, target, count), rtol=0, atol=1e-6)


def test_an_aligner_comes_first_and_noise_last(tmp_path: Path) -> None:
    source, target = (side.astype(np.float32) for side in sides())
    for name, rows in (("source", source), ("target", target)):
        np.save(tmp_path / f"{name}.npy", rows)
    files = {"source": tmp_path / "source.npy", "target": tmp_path / "target.npy"}
    correction = Correction.from_aligner("gaussian_monge", **files, neighbours=3)
    standins = make_aligner("gaussian_monge").fit(source, target).transform(torch.from_numpy(source)).double().numpy()
    wanted = expected(standins, target.astype(np.float64), 3)
    np.testing.assert_allclose(correction(torch.from_numpy(source)).numpy(), wanted, rtol=0, atol=1e-6)
    noisy = Correction.from_aligner("gaussian_monge", **files, neighbours=3, noise_std=0.01)
    torch.manual_seed(0)
    moved = noisy(torch.from_numpy(source)).numpy()
    torch.manual_seed(0)
    noise = torch.randn(300, 8).numpy()
    np.testing.assert_allclose(moved, unit(wanted + 0.01 * noise), rtol=0, atol=1e-6)


def test_a_mean_shift_changes_no_neighbour() -> None:
    """Directions are taken from the means, so that stand-ins moved alike find the same rows."""
    source, target = (torch.from_numpy(side) for side in sides())
    plain = NeighbourMean(target, source.mean(dim=0))
    moved = source + torch.arange(8) / 10
    shifted = NeighbourMean(target, moved.mean(dim=0))
    assert torch.equal(plain.nearest(source), shifted.nearest(moved))


def test_rows_and_count_are_part_of_the_fingerprint() -> None:
    source, target = (torch.from_numpy(side) for side in sides())
    centre = source.mean(dim=0)
    found = [
        Correction(neighbours=NeighbourMean(target, centre)),
        Correction(neighbours=NeighbourMean(target, centre, count=4)),
        Correction(neighbours=NeighbourMean(target.flip(0), centre)),
        Correction(neighbours=NeighbourMean(target, centre), noise_std=0.1),
    ]
    assert len({each.fingerprint for each in found}) == 4
    assert found[0].fresh().fingerprint == found[0].fingerprint
    assert torch.equal(found[0].fresh()(source), found[0](source))


def test_no_batch_changes_a_row() -> None:
    source, target = (torch.from_numpy(side).float() for side in sides(rows=5000))
    mean = NeighbourMean(target, source.mean(dim=0))
    whole = mean(source)  # two chunks
    assert torch.equal(whole[4000:], mean(source[4000:])) and mean(source[:0]).shape == (0, 8)
    assert mean(source.double()).dtype == torch.float64


def test_bad_input_is_named() -> None:
    rows = torch.eye(3)
    with pytest.raises(InputError, match=r"\[3, 3\] and \[2\]"):
        NeighbourMean(rows, rows[0, :2])
    with pytest.raises(InputError, match="from 1 to the 3 rows of the target, got 5"):
        NeighbourMean(rows, rows[0])
    with pytest.raises(InputError, match="not finite"):
        NeighbourMean(rows * float("nan"), rows[0], count=1)
    nearest = NeighbourMean(rows, rows[0], count=1)
    with pytest.raises(InputError, match="no gradient passes"):
        Correction(neighbours=nearest, trainable=True)
    source, target = sides()
    fitted = make_aligner("mean_shift").fit(source, target)
    with pytest.raises(InputError, match="width of the aligner, 8, got 3"):
        Correction(fitted, neighbours=nearest)
    with pytest.raises(InputError, match="pass both"):
        Correction.from_aligner(fitted, neighbours=2)
    with pytest.raises(InputError, match="which neighbours replace"):
        Correction.from_aligner(fitted, source=source, target=target, neighbours=2, noise_shape="residual")
    with pytest.raises(InputError, match="take the residual's place"):
        choose_arms(["realign"], noise="residual", neighbours=2)


def test_arms_with_neighbours_stand_beside_identity() -> None:
    arms = choose_arms(["blind", "identity", "c3_code", "anisoalign", "anisoalign-tuned", "images"], neighbours=5)
    assert [(arm.name, arm.neighbours) for arm in arms] == [
        ("blind", 0),
        ("identity", 0),
        ("identity-neighbours", 5),
        ("c3_code", 0),
        ("anisoalign-neighbours", 5),
        ("anisoalign-tuned", 0),
        ("images", 0),
    ]
    named = choose_arms(["identity-neighbours", "realign", "realign-neighbours"])
    assert [(arm.name, arm.neighbours) for arm in named] == [
        ("identity-neighbours", 5),
        ("realign", 0),
        ("realign-neighbours", 5),
    ]
    with pytest.raises(InputError, match="unknown arm 'anisoalign-tuned-neighbours'"):
        choose_arms(["anisoalign-tuned-neighbours"])
    levels = choose_arms(["identity"], noise="each", neighbours=5)
    assert [arm.noise_std for arm in levels if arm.tuned == "identity-neighbours"] == [0.0, 0.02, 0.04, 0.06]


def test_no_row_finds_its_own_target_or_a_copy_of_it() -> None:
    random = np.random.default_rng(0)
    distinct = random.standard_normal((60, 4)).astype(np.float32)
    target = distinct[random.integers(0, 60, 200)]
    seen = np.zeros(200, dtype=int)
    for own, others in strangers(target, None):
        seen[own] += 1
        assert not {row.tobytes() for row in target[own]} & {row.tobytes() for row in others}
        assert len(others) > 40
    assert (seen == 1).all()
