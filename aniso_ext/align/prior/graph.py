"""The coupling graph of the target phases and the drift that it exerts (METHOD section 3, paper eq. (4))."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aniso_ext.align.prior.wrapped_normal import wrap
from aniso_ext.errors import InputError
from aniso_ext.stats import PhaseMoments

PARTNERS = 8
SIGNIFICANCE = 0.01
STEP_LIMIT = 0.1
CONTRACTION = 0.5
RADIUS_EPS = 1e-12
_HERMITIAN_TOLERANCE = 1e-9
_FIELDS = ("coupling_real", "coupling_imag", "anchor", "alpha", "tau")


@dataclass(frozen=True, eq=False)
class PhaseGraph:
    """Anchors and couplings of M phases: a potential on the torus, its gradient and one step along it.

        Psi(phi) = -sum_k alpha_k cos(phi_k - psi_k) - sum_{edges (k,l)} A_kl cos(phi_k - phi_l - eta_kl)
        [grad Psi]_k = alpha_k sin(phi_k - psi_k) + sum_{l: (k,l) in E} A_kl sin(phi_k - phi_l - eta_kl)
                     = Im(e^{i phi_k} conj(alpha_k e^{i psi_k} + sum_l C_kl e^{i phi_l})),  C_kl = A_kl e^{i eta_kl}
        mu(phi) = wrap(phi - tau grad Psi(phi))

    The last form is one real [n, 2M] x [2M, 2M] product. tau keeps I - tau Hess Psi positive definite, so mu can be
    inverted (METHOD D6).

    Attributes:
        coupling_real, coupling_imag: C, Hermitian [M, M] float64, zero where there is no edge and on the diagonal.
        anchor: psi [M]; alpha: [M], the blocks' shares of the mean squared radius.
        tau: the step, [1]; ``step`` is the same as a number.

    Raises:
        InputError: a shape or value does not fit; the message names the field.

    Example:
        >>> import numpy as np, torch
        >>> theta = np.random.default_rng(0).vonmises(0.5, 4.0, (500, 1)) + np.array([[0.0, 1.0]])
        >>> graph = PhaseGraph.from_moments(PhaseMoments(2).update(theta), torch.ones(2))
        >>> graph.edges.tolist(), round(float(graph.offset[1, 0]), 6)
        ([[0, 1]], 1.0)
    """

    coupling_real: torch.Tensor
    coupling_imag: torch.Tensor
    anchor: torch.Tensor
    alpha: torch.Tensor
    tau: torch.Tensor
    step: float = field(init=False, repr=False)
    _operands: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = torch.as_tensor(getattr(self, name)).detach().to(device="cpu", dtype=torch.float64).contiguous()
            object.__setattr__(self, name, value)
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise InputError(f"PhaseGraph.{name} has {bad} non-finite values: fit the prior again")
        blocks = self.anchor.numel()
        shapes = {"coupling_real": (blocks, blocks), "coupling_imag": (blocks, blocks), "tau": (1,)}
        for name in _FIELDS:
            wanted = shapes.get(name, (blocks,))
            if tuple(getattr(self, name).shape) != wanted:
                raise InputError(
                    f"PhaseGraph.{name} must have shape {list(wanted)}, got {list(getattr(self, name).shape)}"
                )
        object.__setattr__(self, "step", float(self.tau))
        skew = max(
            float((self.coupling_real - self.coupling_real.T).abs().max()),
            float((self.coupling_imag + self.coupling_imag.T).abs().max()),
            float(self.coupling_real.diagonal().abs().max()),
        )
        if skew > _HERMITIAN_TOLERANCE:
            raise InputError(f"PhaseGraph.coupling must be Hermitian with a zero diagonal, it is off by {skew:.2e}")
        if bool((self.alpha < 0).any()):
            raise InputError("PhaseGraph.alpha must not be negative")
        if not (float(self.tau) > 0 and float(self.tau) * self.curvature_bound < 1):
            raise InputError(
                f"PhaseGraph.tau is {float(self.tau)}: it must be positive and below 1/L with L = "
                f"{self.curvature_bound:.4g}, or the drift map cannot be inverted"
            )

    @classmethod
    def from_moments(
        cls,
        moments: PhaseMoments,
        mean_squared_radius: torch.Tensor,
        *,
        partners: int = PARTNERS,
        connected: bool = False,
    ) -> PhaseGraph:
        """The graph of the target phases (METHOD D5, D6).

        Each block proposes its ``partners`` strongest couplings; an edge is what either end proposes, if
        A_kl > sqrt(ln(M^2/(2 * 0.01))/n): for n independent uniform phases P(|M_kl| > t) = exp(-n t^2), so that one
        chance edge among all pairs has probability 1 % at most.

        With ``connected`` the coupling is M_kl - E e^{i theta_k} E e^{-i theta_l} throughout: in the choice of edges,
        in A and eta, and so in the potential, its gradient and tau. The edges then hold what the anchors do not
        explain. Under independence its variance is (1 - |m_k|^2)(1 - |m_l|^2)/n <= 1/n, so the threshold stays valid.

        Args:
            moments: of target phases.
            mean_squared_radius: E rho_k^2 [M].
            partners: p; M - 1 where there are fewer other blocks.
            connected: take the means' share out of the couplings.
        """
        blocks = moments.blocks
        if isinstance(partners, bool) or not isinstance(partners, (int, np.integer)) or partners < 0:
            raise InputError(f"partners must be an integer of at least 0, got {partners!r}")
        squared = torch.as_tensor(mean_squared_radius, dtype=torch.float64).cpu()
        if tuple(squared.shape) != (blocks,) or not bool((torch.isfinite(squared) & (squared >= 0)).all()):
            raise InputError(f"mean_squared_radius must be [{blocks}], finite and not negative")
        coupling = moments.connected() if connected else moments.second
        coupling = (coupling + coupling.conj().T) / 2
        edges = _edges(np.abs(coupling), moments.count, int(partners))
        coupling = np.where(edges, coupling, 0)
        alpha = squared / (squared.sum() + RADIUS_EPS)
        bound = _curvature_bound(alpha, torch.from_numpy(np.abs(coupling)))
        return cls(
            coupling_real=torch.from_numpy(coupling.real.copy()),
            coupling_imag=torch.from_numpy(coupling.imag.copy()),
            anchor=torch.from_numpy(np.angle(moments.first)),
            alpha=alpha,
            tau=torch.tensor([min(STEP_LIMIT, CONTRACTION / bound) if bound > 0 else STEP_LIMIT], dtype=torch.float64),
        )

    @property
    def blocks(self) -> int:
        """M."""
        return self.anchor.numel()

    @property
    def amplitude(self) -> torch.Tensor:
        """A_kl [M, M], zero where there is no edge."""
        return torch.hypot(self.coupling_real, self.coupling_imag)

    @property
    def offset(self) -> torch.Tensor:
        """eta_kl [M, M], zero where there is no edge."""
        return torch.atan2(self.coupling_imag, self.coupling_real)

    @property
    def edges(self) -> torch.Tensor:
        """[E, 2] int64, k < l: each edge once."""
        return torch.triu(self.amplitude, diagonal=1).nonzero()

    @property
    def curvature_bound(self) -> float:
        """L = max_k(alpha_k + 2 sum_l A_kl), at least the largest eigenvalue of any Hessian of Psi (Gershgorin)."""
        return _curvature_bound(self.alpha, self.amplitude)

    def drift(self, theta: torch.Tensor) -> torch.Tensor:
        """grad Psi(theta), [n, M] for phases [n, M] of any floating dtype and device; differentiable."""
        self._check(theta)
        weight, bias = self.matrices(theta)
        cos, sin = theta.cos(), theta.sin()
        with torch.autocast(theta.device.type, enabled=False):
            pull = torch.addmm(bias, torch.cat((cos, sin), dim=-1), weight)
        real, imag = pull.split(self.blocks, dim=-1)
        return sin * real - cos * imag

    def potential(self, theta: torch.Tensor) -> torch.Tensor:
        """Psi(theta), [n]; its gradient is :meth:`drift`."""
        self._check(theta)
        weight, bias = self.matrices(theta)
        direction = torch.cat((theta.cos(), theta.sin()), dim=-1)
        with torch.autocast(theta.device.type, enabled=False):
            return -(direction * bias).sum(-1) - 0.5 * (direction * (direction @ weight)).sum(-1)

    def mean_map(self, theta: torch.Tensor) -> torch.Tensor:
        """mu(theta) = wrap(theta - tau grad Psi(theta)), [n, M] in [-pi, pi)."""
        return wrap(theta - self.step * self.drift(theta))

    def inverse_mean_map(self, phi: torch.Tensor, *, iterations: int = 60) -> torch.Tensor:
        """theta with mu(theta) = phi: the fixed point of theta <- phi + tau grad Psi(theta).

        Each iteration divides the error by at least 1/(tau L) >= 2, so sixty reach the rounding error of float64.
        """
        theta = phi
        for _ in range(iterations):
            theta = phi + self.step * self.drift(theta)
        return wrap(theta)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The named arrays of the graph, float64."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> PhaseGraph:
        """The graph that :meth:`tensors` describes; a missing or unknown name is an :class:`InputError`."""
        missing, unknown = sorted(set(_FIELDS) - set(tensors)), sorted(set(tensors) - set(_FIELDS))
        if missing or unknown:
            raise InputError(f"the arrays of a phase graph do not fit: missing {missing}, unknown {unknown}")
        return cls(**dict(tensors))

    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        digest = hashlib.sha256()
        for name, value in self.tensors().items():
            digest.update(f"{name}:{list(value.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def _check(self, theta: torch.Tensor) -> None:
        if theta.dim() != 2 or theta.shape[1] != self.blocks or not theta.is_floating_point():
            raise InputError(f"phases must be floating [n, {self.blocks}], got {theta.dtype} {list(theta.shape)}")

    def matrices(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[2M, 2M] and [2M] that give the real and imaginary pull alpha e^{i psi} + C e^{i phi} from [cos, sin].

        They have device and dtype of ``theta``.
        """
        key = (theta.device, theta.dtype)
        if key not in self._operands:
            rows = (
                torch.cat((self.coupling_real, self.coupling_imag), dim=0).T,
                torch.cat((-self.coupling_imag, self.coupling_real), dim=0).T,
            )
            anchor = torch.cat((self.alpha * self.anchor.cos(), self.alpha * self.anchor.sin()))
            with torch.inference_mode(False):
                self._operands[key] = (torch.cat(rows, dim=0).to(*key), anchor.to(*key))
        return self._operands[key]


def _edges(amplitude: np.ndarray, count: int, partners: int) -> np.ndarray:
    """Symmetric [M, M] mask of the edges."""
    blocks = len(amplitude)
    strength = amplitude - 2 * np.eye(blocks)
    order = np.argsort(-strength, axis=1, kind="stable")[:, : min(partners, blocks - 1)]
    proposed = np.zeros((blocks, blocks), dtype=bool)
    np.put_along_axis(proposed, order, True, axis=1)
    threshold = math.sqrt(max(0.0, math.log(blocks**2 / (2 * SIGNIFICANCE))) / count)
    return (proposed | proposed.T) & (strength > threshold)


def _curvature_bound(alpha: torch.Tensor, amplitude: torch.Tensor) -> float:
    return float((alpha + 2 * amplitude.sum(dim=1)).max())
