"""Stage I formulas against NumPy in float64: graph, drift, potential, wrapped normal, network, objective."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext.align.prior import PhaseGraph, PhasePrior, ScoreNetwork
from aniso_ext.align.prior.frozen import (
    FrozenScore,
    _modulated,
    _unmodulated,
    fused_modulated,
    fused_unmodulated,
)
from aniso_ext.align.prior.wrapped_normal import log_density, sample, score, wrap
from aniso_ext.errors import InputError
from aniso_ext.stats import PhaseMoments


def coupled_phases(rows: int, blocks: int, seed: int) -> np.ndarray:
    """Phases that share a few hidden angles, so that many pairs are coupled."""
    rng = np.random.default_rng(seed)
    hidden = rng.vonmises(0.4, 1.0, (rows, 3))
    mixed = hidden[:, rng.integers(0, 3, blocks)] + rng.uniform(-3, 3, blocks)
    return mixed + rng.normal(scale=rng.uniform(0.3, 2.0, blocks), size=(rows, blocks))


def graph_of(theta: np.ndarray, **options: object) -> tuple[PhaseGraph, np.ndarray]:
    squared = np.random.default_rng(9).uniform(0.1, 1.0, theta.shape[1])
    moments = PhaseMoments(theta.shape[1]).update(theta)
    return PhaseGraph.from_moments(moments, torch.from_numpy(squared), **options), squared


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("rows, partners", [(3000, 3), (40, 8)])
def test_graph_is_what_the_definition_says(connected: bool, rows: int, partners: int) -> None:
    theta = coupled_phases(rows, 9, seed=rows)
    graph, squared = graph_of(theta, partners=partners, connected=connected)
    unit = np.exp(1j * theta)
    coupling = np.mean(unit[:, :, None] * unit[:, None, :].conj(), axis=0)
    if connected:
        coupling -= np.outer(unit.mean(0), unit.mean(0).conj())
    threshold = math.sqrt(math.log(81 / 0.02) / rows)
    proposals = set()
    for k in range(9):
        others = sorted((other for other in range(9) if other != k), key=lambda other: -abs(coupling[k, other]))
        proposals |= {(min(k, other), max(k, other)) for other in others[:partners]}
    edges = sorted(pair for pair in proposals if abs(coupling[pair]) > threshold)
    assert [tuple(edge) for edge in graph.edges.tolist()] == edges and edges
    for k, other in edges:
        assert abs(float(graph.amplitude[k, other]) - abs(coupling[k, other])) < 1e-13
        assert abs(np.exp(1j * float(graph.offset[k, other])) - np.exp(1j * np.angle(coupling[k, other]))) < 1e-12
    assert np.abs(graph.anchor.numpy() - np.angle(unit.mean(0))).max() < 1e-12
    assert np.abs(graph.alpha.numpy() - squared / squared.sum()).max() < 1e-12
    pulls = [sum(abs(coupling[pair]) for pair in edges if k in pair) for k in range(9)]
    bound = max(a + 2 * pull for a, pull in zip(squared / squared.sum(), pulls, strict=True))
    assert float(graph.tau) == pytest.approx(min(0.1, 0.5 / bound), rel=1e-12)


def test_independent_phases_have_no_edges_and_means_alone_make_them_unless_connected() -> None:
    # The threshold lets one chance edge through with probability 1 %; this seed is none of those.
    rng = np.random.default_rng(0)
    uniform = rng.uniform(-np.pi, np.pi, (4000, 16))
    assert len(graph_of(uniform)[0].edges) == 0
    concentrated = rng.vonmises(0.5, 2.0, (4000, 16))
    assert len(graph_of(concentrated)[0].edges) >= 16 * 8 / 2
    assert len(graph_of(concentrated, connected=True)[0].edges) == 0


@pytest.mark.parametrize("connected", [False, True])
def test_drift_is_the_double_loop_and_the_gradient_of_the_potential(connected: bool) -> None:
    graph, _ = graph_of(coupled_phases(800, 7, seed=1), partners=3, connected=connected)
    theta = np.random.default_rng(2).uniform(-4, 4, (20, 7))
    alpha, anchor = graph.alpha.numpy(), graph.anchor.numpy()
    amplitude, offset = graph.amplitude.numpy(), graph.offset.numpy()
    drift, potential = np.zeros((20, 7)), np.zeros(20)
    for row in range(20):
        for k in range(7):
            drift[row, k] += alpha[k] * math.sin(theta[row, k] - anchor[k])
            potential[row] -= alpha[k] * math.cos(theta[row, k] - anchor[k])
            for other in range(7):
                if amplitude[k, other] > 0:
                    angle = theta[row, k] - theta[row, other] - offset[k, other]
                    drift[row, k] += amplitude[k, other] * math.sin(angle)
                    potential[row] -= amplitude[k, other] * math.cos(angle) * (k < other)
    phases = torch.from_numpy(theta).requires_grad_()
    assert np.abs(graph.drift(phases).detach().numpy() - drift).max() < 1e-13
    values = graph.potential(phases)
    assert np.abs(values.detach().numpy() - potential).max() < 1e-13
    (gradient,) = torch.autograd.grad(values.sum(), phases)
    assert np.abs(gradient.numpy() - drift).max() < 1e-13
    # float32: at most 2 * 7 + 1 terms of size at most 1 are added, each with a handful of roundings of 6e-8
    assert np.abs(graph.drift(torch.from_numpy(theta).float()).numpy() - drift).max() < 15 * 5 * 6e-8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 8), connected=st.booleans())
def test_the_drift_map_can_be_inverted(seed: int, blocks: int, connected: bool) -> None:
    """METHOD D6: eigenvalues of I - tau Hess Psi lie in [1/2, 3/2] at every phase, and mu has its inverse."""
    graph, _ = graph_of(coupled_phases(500, blocks, seed), connected=connected)
    theta = torch.from_numpy(np.random.default_rng(seed).uniform(-np.pi, np.pi, (4, blocks)))
    tau = float(graph.tau)
    for row in theta:
        jacobian = torch.autograd.functional.jacobian(lambda phi: phi - tau * graph.drift(phi[None])[0], row)
        assert (jacobian - jacobian.T).abs().max() < 1e-14
        eigenvalues = torch.linalg.eigvalsh(jacobian)
        assert float(eigenvalues[0]) >= 0.5 - 1e-12 and float(eigenvalues[-1]) <= 1.5 + 1e-12
    back = graph.inverse_mean_map(graph.mean_map(theta))
    assert wrap(back - theta).abs().max() < 1e-13


def test_graph_round_trip_and_refusals() -> None:
    graph, _ = graph_of(coupled_phases(500, 4, seed=0))
    again = PhaseGraph.from_tensors(graph.tensors())
    assert again.fingerprint() == graph.fingerprint() and float(again.tau) == float(graph.tau)
    for name, value, message in (
        ("anchor", torch.full((4,), math.nan), "anchor has 4 non-finite"),
        ("alpha", torch.ones(3), r"alpha must have shape \[4\]"),
        ("coupling_real", torch.ones(4, 4), "zero diagonal"),
        ("coupling_imag", torch.ones(4, 4), "Hermitian"),
        ("tau", torch.ones(1), "tau is 1.0: it must be positive and below"),
    ):
        with pytest.raises(InputError, match=message):
            PhaseGraph.from_tensors({**graph.tensors(), name: value})
    with pytest.raises(InputError, match=r"missing \['tau'\]"):
        PhaseGraph.from_tensors({name: value for name, value in graph.tensors().items() if name != "tau"})
    with pytest.raises(InputError, match=r"phases must be floating \[n, 4\]"):
        graph.drift(torch.zeros(3, 5))
    with pytest.raises(InputError, match="partners must be"):
        graph_of(coupled_phases(50, 4, seed=0), partners=-1)


def long_sum(delta: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density and score of the wrapped normal, 101 images, NumPy float64."""
    images = delta[:, None] + 2 * np.pi * np.arange(-50, 51)
    exponent = -(images**2) / (2 * scale**2)
    top = exponent.max(axis=1, keepdims=True)
    weights = np.exp(exponent - top)
    total = weights.sum(axis=1)
    density = top[:, 0] + np.log(total) - 0.5 * np.log(2 * np.pi * scale**2)
    return density, -(weights * images).sum(axis=1) / total / scale**2


@pytest.mark.parametrize("scale", [0.03, 0.1, 0.4, 0.9, 1.2, 1.5])
def test_score_agrees_with_a_long_sum(scale: float) -> None:
    delta = np.linspace(-np.pi, np.pi, 2001)
    density, slope = long_sum(delta, scale)
    got = score(torch.from_numpy(delta), scale).numpy()
    assert np.abs(got - slope).max() < 4e-7
    assert np.abs(log_density(torch.from_numpy(delta), scale).numpy() - density).max() < 4e-7
    # float32: the images and their weights are rounded, each by 2^-24 of pi; near pi two images nearly cancel and the
    # exponents, up to (pi/s)^2/2, decide between them
    rounding = 2.0**-24 * (np.pi / scale**2) * (4 + (np.pi / scale) ** 2)
    narrow = torch.from_numpy(delta).float()
    exact = long_sum(narrow.double().numpy(), scale)[1]
    inside = np.abs(delta) < np.pi - 1e-6
    assert np.abs(score(narrow, scale).numpy() - exact)[inside].max() < 4e-7 + rounding


def test_score_agrees_with_eighty_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(80):
        for scale in (0.03, 0.7, 1.5):
            for delta in (-3.1, -1.0, 0.002, 2.0, 3.14):
                images = [mpmath.mpf(delta) + 2 * mpmath.pi * n for n in range(-30, 31)]
                weights = [mpmath.exp(-(image**2) / (2 * mpmath.mpf(scale) ** 2)) for image in images]
                total = mpmath.fsum(weights)
                mean = mpmath.fsum(w * x for w, x in zip(weights, images, strict=True)) / total
                got = float(score(torch.tensor([delta], dtype=torch.float64), scale)[0])
                assert abs(got + float(mean / mpmath.mpf(scale) ** 2)) < 4e-7


def test_scales_may_differ_by_row_and_the_score_is_the_slope_of_the_density() -> None:
    delta = torch.linspace(-3, 3, 50, dtype=torch.float64).reshape(10, 5).requires_grad_()
    scales = torch.linspace(0.1, 1.5, 10, dtype=torch.float64)[:, None]
    (slope,) = torch.autograd.grad(log_density(delta, scales).sum(), delta)
    assert (score(delta, scales) - slope).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_samples_have_the_moments_of_a_wrapped_normal(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = sample(torch.full((200_000,), 3.0, dtype=torch.float64), scale, generator).numpy()
    assert (-np.pi <= drawn).all() and (drawn < np.pi).all()
    for k in (1, 2):  # E e^{ik(x - mu)} = exp(-k^2 s^2/2), deviation at most 1/sqrt(n) in each part
        assert abs(np.exp(1j * k * (drawn - 3.0)).mean() - math.exp(-((k * scale) ** 2) / 2)) < 5 / math.sqrt(200_000)


@settings(max_examples=60, deadline=None)
@given(angle=st.floats(-1e4, 1e4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_wrap_lands_in_the_interval_and_changes_by_whole_turns(angle: float, dtype: torch.dtype) -> None:
    value = torch.tensor([angle], dtype=dtype, requires_grad=True)
    wrapped = wrap(value)
    (slope,) = torch.autograd.grad(wrapped.sum(), value)
    assert float(slope) == 1
    value, wrapped = value.detach(), wrapped.detach()
    assert -math.pi <= float(wrapped) < math.pi or float(wrapped) == float(torch.tensor(-math.pi, dtype=dtype))
    # 2 pi is rounded to the dtype, once for each of at most 1600 turns
    turns = (float(value) - float(wrapped)) / (2 * math.pi)
    assert abs(turns - round(turns)) < 1600 * torch.finfo(dtype).eps + 1e-9
    assert torch.equal(wrap(wrapped), wrapped)
    ends = torch.tensor([math.pi, -math.pi, np.nextafter(np.float32(np.pi), np.float32(0))], dtype=torch.float32)
    assert torch.equal(wrap(ends), torch.tensor([-math.pi, -math.pi, float(ends[2])], dtype=torch.float32))


def random_network(blocks: int = 3) -> ScoreNetwork:
    """A network whose zero layers are filled: nothing about it is trivial."""
    torch.manual_seed(0)
    network = ScoreNetwork(blocks, width=32, blocks=2).double()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return network


def test_network_is_periodic() -> None:
    network = random_network()
    generator = torch.Generator().manual_seed(1)
    phi = 6 * torch.rand(50, 3, generator=generator, dtype=torch.float64) - 3
    radii = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    scale = 0.03 + torch.rand(50, 1, generator=generator, dtype=torch.float64)
    turns = torch.randint(-3, 4, (50, 3), generator=generator).double()
    base, turned = network(phi, radii, scale), network(phi + 2 * math.pi * turns, radii, scale)
    # an angle of at most 22 is off by 4e-15, and a network of slope below 1e3 carries that on
    assert base.abs().max() > 0.1 and (turned - base).abs().max() < 4e-12


def test_network_reads_noise_radii_and_every_phase() -> None:
    network = random_network()
    phi, radii, scale = torch.zeros(1, 3).double(), torch.zeros(1, 3).double(), torch.full((1, 1), 0.5).double()
    base = network(phi, radii, scale)
    for changed in (
        network(phi + torch.eye(3)[:1], radii, scale),
        network(phi, radii + torch.eye(3)[2:], scale),
        network(phi, radii, 2 * scale) * torch.sqrt((4 * scale**2 + 1) / (scale**2 + 1)),
    ):
        assert (changed - base).abs().min() > 1e-6


def frozen_and_learned(
    network: ScoreNetwork, frozen: FrozenScore, dtype: torch.dtype, autocast: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(u, v) and their derivatives to sines, cosines and radii along one direction: network, then frozen network."""
    generator = torch.Generator().manual_seed(2)
    phi = 6 * torch.rand(200, 3, generator=generator, dtype=torch.float64) - 3
    radii = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    inputs = torch.cat((phi.sin(), phi.cos(), radii), dim=1).to(dtype).requires_grad_()
    scale = 0.03 + torch.rand(200, 1, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(200, 6, generator=generator, dtype=torch.float64).to(dtype)
    outputs: list[torch.Tensor] = []
    hooks = [
        network.output.register_forward_hook(lambda module, given, out: outputs.append(out)),
        network.input.register_forward_pre_hook(lambda module, given: (inputs,)),
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        network(phi.to(dtype), radii.to(dtype), scale)
    for hook in hooks:
        hook.remove()
    learned = [outputs[0].detach(), *torch.autograd.grad(outputs[0], inputs, grad.to(outputs[0].dtype))]
    with torch.no_grad():
        condition = frozen.condition(scale)
        uv, kept = frozen.forward(inputs.to(frozen.dtype), condition)
        return learned, [uv, frozen.backward(grad.to(uv.dtype), condition, kept)]


def test_the_frozen_network_has_the_values_and_derivatives_of_the_network() -> None:
    network = random_network()
    learned, frozen = frozen_and_learned(network, FrozenScore(network, torch.float64), torch.float64)
    for one, other in zip(frozen, learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_a_compiler_may_fuse_is_what_runs_without_one() -> None:
    torch.manual_seed(4)
    hidden, back, grad, gain = (torch.randn(50, 32, dtype=torch.float64) for _ in range(4))
    film = torch.cat((gain, torch.randn(50, 32, dtype=torch.float64)), dim=1)
    expected, mean, scale = _modulated(hidden, film, 1e-5)
    torch.testing.assert_close(fused_modulated(hidden, film, 1e-5), (expected, mean, scale), rtol=1e-12, atol=1e-12)
    fused = fused_unmodulated(back, grad, gain, hidden, mean, scale)
    plain = _unmodulated(back.clone(), grad.clone(), gain, hidden, mean, scale)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_the_frozen_network_in_bfloat16_is_as_exact_as_autocast() -> None:
    network = random_network()
    exact, _ = frozen_and_learned(network, FrozenScore(network, torch.float64), torch.float64)
    network = network.float()
    autocast, frozen = frozen_and_learned(network, FrozenScore(network, torch.bfloat16), torch.float32, autocast=True)
    for mine, theirs, wanted in zip(frozen, autocast, exact, strict=True):
        error, allowed = (mine - wanted).norm(), (theirs - wanted).norm()
        # what the norms hand on is rounded to 8 bits once more in each block
        assert error < 2 * allowed < 0.1 * wanted.norm()


def test_network_starts_at_a_score_of_zero() -> None:
    network = ScoreNetwork(4, width=16, blocks=2)
    assert torch.count_nonzero(network(torch.randn(5, 4), torch.randn(5, 4), torch.full((5, 1), 0.3))) == 0


def prior_of(blocks: int = 3, *, random: bool = True) -> PhasePrior:
    theta = coupled_phases(500, blocks, seed=4)
    graph, _ = graph_of(theta)
    resultant = torch.from_numpy(np.abs(np.exp(1j * theta).mean(0)))
    mean, std = torch.linspace(-2, -1, blocks), torch.linspace(0.2, 0.6, blocks)
    prior = PhasePrior(graph, resultant, mean, std, width=32, blocks=2)
    if random:
        torch.manual_seed(3)
        with torch.no_grad():
            for value in prior.parameters():
                value.add_(0.2 * torch.randn_like(value))
    return prior.double()


def test_objective_is_the_formula() -> None:
    """Paper eq. (6) spelled out in NumPy, with the network as a black box."""
    prior = prior_of()
    rng = np.random.default_rng(0)
    theta, log_rho = rng.uniform(-np.pi, np.pi, (400, 3)), rng.normal(-1.5, 0.5, (400, 3))
    got = prior.loss(
        torch.from_numpy(theta), torch.from_numpy(log_rho), torch.Generator().manual_seed(7), reduction="none"
    )
    generator = torch.Generator().manual_seed(7)
    scale = np.exp(np.log(0.03) + torch.rand(400, 1, generator=generator).double().numpy() * np.log(1.5 / 0.03))
    noise = torch.randn(400, 3, generator=generator).double().numpy()
    tau, drift = float(prior.graph.tau), prior.graph.drift(torch.from_numpy(theta)).numpy()
    mean = theta - tau * drift
    noisy = np.angle(np.exp(1j * (mean + scale * noise)))
    standardised = np.clip((log_rho - prior.log_radius_mean.numpy()) / prior.log_radius_std.numpy(), -5, 5)
    with torch.no_grad():
        predicted = prior.network(
            torch.from_numpy(noisy), torch.from_numpy(standardised), torch.from_numpy(scale)
        ).numpy()
    distance = np.angle(np.exp(1j * (noisy - mean)))
    wanted = np.stack([long_sum(distance[row], float(scale[row, 0]))[1] for row in range(400)])
    expected = (scale[:, 0] ** 2) * ((predicted - wanted) ** 2).sum(1)
    # the target score is exact to 4e-7, the residual is at most a few tens
    assert np.abs(got.detach().numpy() - expected).max() < 1e-4 * max(1.0, expected.max())
    mean_loss = prior.loss(torch.from_numpy(theta), torch.from_numpy(log_rho), torch.Generator().manual_seed(7))
    assert mean_loss.item() == pytest.approx(got.mean().item(), rel=1e-12)


def test_objective_is_differentiable_in_phases_and_radii_through_a_frozen_prior() -> None:
    prior = prior_of().freeze()
    theta = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    log_rho = torch.linspace(-2.0, -1.2, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()

    def loss(phases: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
        return prior.loss(phases, radii, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, (theta, log_rho), eps=1e-6, atol=1e-6, rtol=1e-5)
    loss(theta, log_rho).backward()
    assert all(value.grad is None for value in prior.parameters())


def test_scale_may_be_a_number_or_one_a_row() -> None:
    prior = prior_of()
    phi, log_rho = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    whole = prior.score(phi, log_rho, 0.4)
    assert torch.equal(prior.score(phi, log_rho, torch.full((6,), 0.4, dtype=torch.float64)), whole)
    assert torch.equal(prior.score(phi, log_rho, torch.full((6, 1), 0.4, dtype=torch.float64)), whole)


def test_prior_round_trip_is_exact() -> None:
    prior = prior_of().float()
    tensors = prior.tensors()
    assert all(name.startswith("prior.") for name in tensors)
    again = PhasePrior.from_tensors({**tensors, "basis": torch.ones(2)})
    phi, log_rho = torch.randn(6, 3), torch.randn(6, 3)
    assert torch.equal(again.score(phi, log_rho, 0.2), prior.score(phi, log_rho, 0.2))
    assert not any(value.requires_grad for value in again.parameters())
    assert all(torch.equal(value, again.tensors()[name]) for name, value in tensors.items())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("prior.resultant", None, r"missing \['prior.resultant'\]"),
        ("prior.graph.anchor", None, r"missing \['anchor'\]"),
        ("prior.network.output.bias", None, "prior.network.output.bias has shape None, expected"),
        ("prior.other", torch.ones(1), r"unknown \['prior.other'\]"),
        ("prior.network.output.bias", torch.full((6,), math.inf), "prior.network.output.bias has 6 non-finite values"),
        ("prior.network.output.bias", torch.ones(4), r"prior.network.output.bias has shape \[4\], expected \[6\]"),
        ("prior.resultant", torch.full((3,), 2.0), r"prior.resultant must lie in \[0, 1\]"),
        ("prior.log_radius_mean", torch.ones(5), r"prior.log_radius_mean must be \[3\]"),
    ],
)
def test_a_damaged_prior_is_refused(name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = prior_of().float().tensors()
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(InputError, match=message):
        PhasePrior.from_tensors(tensors)


def test_bad_arguments_are_named() -> None:
    prior, generator = prior_of(), torch.Generator()
    with pytest.raises(InputError, match=r"theta must be floating \[n, 3\]"):
        prior.loss(torch.zeros(2, 4), torch.zeros(2, 3), generator)
    with pytest.raises(InputError, match="theta has 2 rows and log_rho 5"):
        prior.loss(torch.zeros(2, 3), torch.zeros(5, 3), generator)
    with pytest.raises(InputError, match="reduction must be"):
        prior.loss(torch.zeros(2, 3), torch.zeros(2, 3), generator, reduction="sum")
