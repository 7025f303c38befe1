"""Moments whose products are made on a device, against NumPy in two passes and against the streamed state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import aniso_ext as aniso
from aniso_ext.align.moments import DeviceMoments
from aniso_ext.stats import Moments

EPS = float(np.finfo(np.float64).eps)


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64) + torch.linspace(-1, 1, width)
    return values / values.norm(dim=1, keepdim=True)


def summed(batches: list[torch.Tensor], device: str = "cpu") -> Moments:
    sums = DeviceMoments(batches[0].shape[1], torch.device(device))
    for batch in batches:
        sums.update(batch.to(device))
    return sums.moments()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_device_sums_are_the_two_pass_covariance(drift: float, device: str) -> None:
    # with drift the first batch, which sets the pivot, lies at one end of the data
    rows = unit_rows(3000, 20, 0)
    rows = rows + drift * torch.linspace(-1, 1, len(rows), dtype=torch.float64)[:, None] / 20**0.5
    found = summed(list(rows.split(700)), device)
    exact = rows.numpy()
    mean = exact.mean(axis=0)
    assert found.count == 3000
    assert np.abs(found.mean - mean).max() <= 8 * EPS
    # rows are at most 3 from the pivot: n products of at most 9, summed with at most n eps of their sum in the worst
    # case and sqrt(n) eps in the typical one
    covariance = (exact - mean).T @ (exact - mean) / len(exact)
    assert np.abs(found.covariance - covariance).max() <= 9 * len(exact) ** 0.5 * EPS


def test_device_sums_merge_with_streamed_moments() -> None:
    rows = unit_rows(900, 6, 1)
    halves = summed([rows[:500]]).merge(Moments(6).update(rows[500:].numpy()))
    whole = Moments(6).update(rows.numpy())
    assert halves.count == whole.count == 900
    assert np.abs(halves.covariance - whole.covariance).max() <= 900**0.5 * EPS
    assert DeviceMoments(6, torch.device("cpu")).moments().count == 0


@pytest.mark.gpu
def test_a_frame_fitted_on_the_gpu_is_that_of_the_cpu() -> None:
    source, target = unit_rows(5000, 32, 2).half(), (-unit_rows(4000, 32, 3)).half()
    frames = [
        aniso.AnisoAlign(rank=16, refine=False, device=device).fit(source, target).frame_ for device in ("cpu", "cuda")
    ]
    for name, value in frames[0].tensors().items():
        # roundings of float64 sums, divided by gaps of eigenvalues of 1e-4 and more
        assert float((frames[1].tensors()[name] - value).abs().max()) <= 1e-9, name
