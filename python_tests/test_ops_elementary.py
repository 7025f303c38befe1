"""Parts of the CPU kernels, each isolated through the operators: radius maps, elementary functions, storage formats.

With the basis along the first axes and zero means, block k of a row is its coordinates 2k and 2k + 1 and V is the rest,
so that single functions can be read off exactly.
"""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from aniso_ext import ops

BACKENDS = ("reference", "cpu")
ULP = 2.0**-23  # of float32, relative


def axis_frame(width: int, source: torch.Tensor, target: torch.Tensor, scale: torch.Tensor | None = None) -> ops.Frame:
    zero, scale = torch.zeros(width, dtype=torch.float64), torch.ones(width) if scale is None else scale
    basis = torch.eye(width, dtype=torch.float64)[:, : 2 * len(source)]
    return ops.Frame(zero, zero, basis, source.double(), target.double(), scale.double(), complement="diagonal")


def identity_frame(width: int, scale: torch.Tensor | None = None) -> ops.Frame:
    """One block with T(rho) = rho, exactly: every radius lies below the first knot."""
    knots = torch.tensor([[1e30, 2e30]])
    return axis_frame(width, knots, knots, scale)


MAPS = {
    "two knots": ([0.5, 1.0], [0.25, 2.0]),
    "uneven": ([1e-5, 2e-5, 3e-5, 0.5, 0.50001, 0.7, 900.0, 1000.0], [0.1, 0.2, 0.4, 0.5, 0.9, 1.0, 2.0, 3.0]),
    "jump inside": ([0.1, 0.4, 0.4, 0.4, 0.9], [0.2, 0.3, 0.5, 0.7, 0.8]),
    "jump at the first knot": ([0.4, 0.4, 0.9], [0.2, 0.5, 0.8]),
    "jump at the last knot": ([0.1, 0.9, 0.9], [0.2, 0.5, 0.8]),
    "all in one place": ([0.4, 0.4, 0.4], [0.2, 0.5, 0.8]),
    "flat": ([0.1, 0.4, 0.9], [0.3, 0.3, 0.3]),
    "from zero": ([0.1, 0.4, 0.9], [0.0, 0.3, 0.6]),
    "clustered": ([*np.geomspace(1e-5, 1e-3, 700), 1.0], [*np.linspace(0.1, 0.9, 700), 1.0]),
    "many": (list(np.linspace(0.01, 1.0, 1024) ** 3), list(np.linspace(0.02, 1.0, 1024))),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_radius_map_agrees_with_linear_interpolation(name, backend, dtype):
    source, target = (torch.tensor([values, values]) for values in MAPS[name])
    target[1] *= 3  # a second block, so that a kernel that mixes blocks up is caught
    knots = np.array(MAPS[name][0])
    spread = np.random.default_rng(0).uniform(knots[0] / 2, 1.5 * knots[-1], 200)
    # Both sides of every knot, as near as float32 tells radii apart, and far outside.
    radii = np.concatenate((spread, knots * (1 + 4 * ULP), knots * (1 - 4 * ULP), [1e-7, 1e4, 1e15]))
    y = torch.zeros(len(radii), 5, dtype=torch.float64)
    y[:, 0], y[:, 3] = torch.from_numpy(radii), -torch.from_numpy(radii)
    y = y.to(dtype)
    logs = ops.encode(y, axis_frame(5, source, target), backend=backend)[:, 4:6].double().numpy()
    rho = np.sqrt(y[:, 0].double().numpy() ** 2 + 1e-12)
    for block in (0, 1):
        exact = oracle.radius_map(rho, source[block].double().numpy(), target[block].double().numpy())
        # rho is known to 2 eps of itself, which the slope turns into a change of T; T and its logarithm round as well
        eps = 2.0**-52 if dtype == torch.float64 else ULP
        nudged = [
            oracle.radius_map(rho * (1 + s * 2 * eps), source[block].numpy(), target[block].numpy()) for s in (-1, 1)
        ]
        low, high = (np.log(edge, where=edge > 0, out=np.full_like(edge, -np.inf)) for edge in nudged)
        with np.errstate(divide="ignore"):
            slack = 4 * eps * (1 + np.abs(np.log(exact)))
        slack = np.where(np.isfinite(slack), slack, 0)
        assert (logs[:, block] >= low - slack).all(), radii[logs[:, block] < low - slack]
        assert (logs[:, block] <= high + slack).all(), radii[logs[:, block] > high + slack]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_radius_map_of_a_non_finite_radius_is_not_finite(value, backend):
    """1e30 overflows its square in float32. Nothing is read from outside the tables, and nothing finite comes out."""
    source, target = torch.tensor([[0.1, 0.4, 0.9]]), torch.tensor([[0.2, 0.3, 0.6]])
    y = torch.tensor([[0.3, 0.1, 0.2, 0.0], [value, 0.1, 0.2, 0.0], [0.3, 0.1, 0.2, 0.0]])
    logs = ops.encode(y, axis_frame(4, source, target), backend=backend)[:, 2]
    assert not math.isfinite(logs[1])
    assert logs[0] == logs[2] and math.isfinite(logs[0])


def decoded_over_anchor(state: torch.Tensor, deltas: torch.Tensor, **bounds: float) -> torch.Tensor:
    """w_j/w_3 for rows w of width 4 with w_3 = v0_3: the norm cancels, two roundings stay (1 ulp)."""
    rows = ops.decode(state, deltas, identity_frame(4), backend="cpu", **bounds).double()
    return rows / rows[:, 3:]


def anchored_states(rows: int, log_rho: torch.Tensor | float = 0.0) -> torch.Tensor:
    state = torch.zeros(rows, 7)
    state[:, 1], state[:, 2], state[:, 6] = 1.0, log_rho, 1.0
    return state


def test_tanh_is_within_four_ulp():
    """Through a step with a_v = 1. Cephes states 1.3 ulp of its rational form; 2/(e^2x + 1) doubles that of exp: 3."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.logspace(-30, 1, 1001), -torch.logspace(-30, 1, 1001)))
    x = torch.cat((x, torch.tensor([0.0, 0.625, -0.625, 0.62499994, 44.0, -50.0, 88.0, 1e10, math.inf, -math.inf])))
    deltas = torch.zeros(len(x), 6)
    deltas[:, 4] = x
    ratio = decoded_over_anchor(anchored_states(len(x)), deltas, a_v=1.0)[:, 2]
    exact = x.double().tanh()
    # 4 ulp and the one of the ratio; results below the smallest normal number may be flushed to zero
    assert ((ratio - exact).abs() <= 5 * ULP * exact.abs() + 2.0**-126).all()


def test_exp_is_within_four_ulp():
    """Through log rho. Cephes states 1 ulp with exact constants; the argument reduction is exact for |n| < 2^7."""
    x = torch.cat((torch.linspace(-40, 40, 4001), torch.logspace(-8, 0, 401), -torch.logspace(-8, 0, 401)))
    ratio = decoded_over_anchor(anchored_states(len(x), x), torch.zeros(len(x), 6))[:, 0]
    exact = x.double().exp()
    assert ((ratio - exact).abs() <= 5 * ULP * exact).all()


def test_exp_runs_into_its_ends():
    """Past the largest float32 the radius is infinite and the row NaN; far below zero it is 0; NaN stays NaN."""
    x = torch.tensor([-1e30, -math.inf, -200.0, 200.0, math.inf, math.nan])
    rows = ops.decode(anchored_states(6, x), torch.zeros(6, 6), identity_frame(4), backend="cpu")
    assert torch.equal(rows[:3], torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(3, 4))
    assert rows[3:, 0].isnan().all()


def test_sine_and_cosine_are_within_two_ulp_of_one():
    """Through a turn of exactly a_theta, as tanh(20) = 1. Errors count against 1, the length of a direction."""
    state, deltas = anchored_states(2), torch.zeros(2, 6)
    deltas[0, 0], deltas[1, 0] = 20.0, -20.0
    for angle in torch.cat((torch.linspace(0, 7, 301), torch.tensor([math.pi / 4, math.pi / 2, math.pi]))).tolist():
        rounded = float(torch.tensor(angle))
        ratio = decoded_over_anchor(state, deltas, a_theta=angle)
        exact = torch.tensor([[math.cos(rounded), math.sin(rounded)], [math.cos(rounded), -math.sin(rounded)]])
        assert ((ratio[:, :2] - exact).abs() <= 3 * ULP).all(), angle


def test_log_is_within_two_ulp():
    """Through log rho0 = log sqrt(a^2 + eps): a rounding of rho is an absolute error of the logarithm."""
    a = torch.cat((torch.logspace(-9, 18, 4001), torch.linspace(0.4, 2.5, 2001)))
    logs = ops.encode(torch.stack((a, 0 * a, 0 * a), dim=1), identity_frame(3), backend="cpu")[:, 2].double()
    exact = 0.5 * (a.double().square() + 1e-12).log()
    # a^2, the sum and the root round by half an ulp each, and half of the first two reaches rho: 1 ulp, doubled
    assert ((logs - exact).abs() <= 2 * ULP + 2 * ULP * exact.abs()).all()


def test_directions_are_of_unit_length_down_to_tiny_radii():
    a = torch.logspace(-17, 15, 2001)
    angle = torch.linspace(-3.1, 3.1, 2001).double()
    y = torch.stack((a.double() * angle.cos(), a.double() * angle.sin(), 0 * a), dim=1).float()
    sin, cos = ops.encode(y, identity_frame(3), backend="cpu")[:, :2].double().unbind(1)
    exact = torch.atan2(y[:, 1].double(), y[:, 0].double())
    assert ((sin - exact.sin()).abs() <= 3 * ULP).all() and ((cos - exact.cos()).abs() <= 3 * ULP).all()


SCALES = (1.0, 1 / 3, 1 + 2.0**-10, 1 + 2.0**-8, 7.0, 2.0**-10, 0.7 * 2.0**-13, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_widened_and_rounded_as_ieee_does(dtype):
    """v0 = scale * y in V: all finite patterns through loads, and through rounding, subnormals and overflow."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    scales = torch.tensor(SCALES)
    frame = identity_frame(2 + len(SCALES), torch.cat((torch.ones(2), scales)))
    y = torch.zeros(len(finite), 2 + len(SCALES), dtype=dtype)
    y[:, 2:] = finite[:, None]
    result = ops.encode(y, frame, backend="cpu")[:, 5:]
    assert torch.equal(result, (finite.float()[:, None] * scales).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_nan_and_infinity_stays_one(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bad = every[~every.isfinite()]
    y = torch.zeros(len(bad), 4, dtype=dtype)
    y[:, 2] = bad
    v0 = ops.encode(y, identity_frame(4), backend="cpu")[:, 5]
    # the projection of an infinity is 0 * inf, so that NaN may come out of either
    assert not v0.isfinite().any() and v0[bad.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_strided_rows_are_widened_alike(dtype):
    y = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    padded = torch.full((9, 24), math.nan, dtype=dtype)
    padded[:, ::2] = y
    frame = identity_frame(12)
    assert torch.equal(ops.encode(padded[:, ::2], frame, backend="cpu"), ops.encode(y, frame, backend="cpu"))
