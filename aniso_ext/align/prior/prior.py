"""The phase prior: the density of the target phases given the radii, learned as a score (METHOD section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from aniso_ext.align.prior.frozen import FrozenScore
from aniso_ext.align.prior.graph import PhaseGraph
from aniso_ext.align.prior.network import BLOCKS, WIDTH, ScoreNetwork
from aniso_ext.align.prior.wrapped_normal import LARGEST_SCALE, SMALLEST_SCALE, score, wrap
from aniso_ext.align.processes import global_normal, global_uniform
from aniso_ext.errors import InputError

PREFIX = "prior."
STANDARDISED_LIMIT = 5.0
"""Standardised log radii are clamped to this: the logarithm of a vanishing radius is no number to condition on."""
_SMALLEST_STD = 1e-6
_STATISTICS = ("resultant", "log_radius_mean", "log_radius_std")


class PhasePrior(nn.Module):
    """Coupling graph and score network over M phases, conditioned on the log radii.

    Learned is the score of noisy, drifted phases, phi~ = wrap(mu(theta) + s eps) with mu from the graph and s
    log-uniform in [0.03, 1.5] (METHOD D7).

    Args:
        graph: anchors, couplings, step.
        resultant: |E e^{i theta_k}| of the target [M].
        log_radius_mean, log_radius_std: of log rho_k over the target [M]; a block that does not vary counts as
            standardised.
        width, blocks: of the network.
        seed: of its initial weights.

    Raises:
        InputError: a shape or value does not fit.

    Example:
        >>> import numpy as np, torch
        >>> from aniso_ext.stats import PhaseMoments
        >>> moments = PhaseMoments(2).update(np.random.default_rng(0).normal(size=(500, 2)))
        >>> graph = PhaseGraph.from_moments(moments, torch.ones(2))
        >>> prior = PhasePrior(graph, torch.ones(2), torch.zeros(2), torch.ones(2), width=16, blocks=1)
        >>> theta, log_rho = torch.zeros(4, 2), torch.zeros(4, 2)
        >>> prior.loss(theta, log_rho, torch.Generator().manual_seed(0)).shape
        torch.Size([])
    """

    resultant: torch.Tensor
    log_radius_mean: torch.Tensor
    log_radius_std: torch.Tensor

    def __init__(
        self,
        graph: PhaseGraph,
        resultant: torch.Tensor,
        log_radius_mean: torch.Tensor,
        log_radius_std: torch.Tensor,
        *,
        width: int = WIDTH,
        blocks: int = BLOCKS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.graph = graph
        for name, value in zip(_STATISTICS, (resultant, log_radius_mean, log_radius_std), strict=True):
            self.register_buffer(name, _statistic(name, value, graph.blocks), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ScoreNetwork(graph.blocks, width=width, blocks=blocks)
        self.network.spread.copy_(self._spread())

    @property
    def phases(self) -> int:
        """M."""
        return self.graph.blocks

    def score(self, phi: torch.Tensor, log_rho: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        """s_phi: the score [n, M] at noisy phases ``phi`` [n, M] with noise ``scale`` (a number, [n] or [n, 1]).

        Differentiable in the phases and the log radii; 2 pi-periodic in the phases.
        """
        self._check(phi, log_rho)
        scales = torch.as_tensor(scale, dtype=phi.dtype, device=phi.device)
        scales = scales.reshape(-1, 1).expand(len(phi), 1)
        predicted: torch.Tensor = self.network(phi, self.standardised(log_rho), scales)
        return predicted

    def loss(
        self,
        theta: torch.Tensor,
        log_rho: torch.Tensor,
        generator: torch.Generator,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The Stage I objective, s^2 |s_phi(phi~, s, log rho) - score|^2 (paper eq. (6)), one draw of (s, eps) a row.

        The target score is that of the wrapped normal at phi~ - mu(theta), which is s eps: it does not depend on
        theta, so that gradients in theta run through phi~ alone.

        Args:
            theta: phases [n, M], floating, clean (not yet drifted or noisy).
            log_rho: log radii [n, M].
            generator: on the device of ``theta``. Under torch.distributed all processes pass equal generators, and
                each gets its share of the noise of the global batch.
            reduction: ``mean`` over rows, or ``none`` for [n]; blocks are summed.

        Raises:
            InputError: shapes or the reduction do not fit.
        """
        if reduction not in ("mean", "none"):
            raise InputError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        rows = self.row_losses(theta, log_rho, *self.draw(len(theta), generator, theta.dtype))
        return rows.mean() if reduction == "mean" else rows

    def draw(
        self, rows: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of :meth:`loss`: scales s [rows, 1], log-uniform, and standard normal [rows, M]."""
        position = global_uniform(rows, generator).to(dtype)
        low, high = math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE)
        return (low + position * (high - low)).exp(), global_normal(rows, self.phases, generator).to(dtype)

    def row_losses(
        self, theta: torch.Tensor, log_rho: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The objective of each row under noise of :meth:`draw`, [n]: a row's depends on that row alone."""
        self._check(theta, log_rho)
        shift = scale * noise
        noisy = wrap(self.graph.mean_map(theta) + shift)
        error = self.score(noisy, log_rho, scale) - score(wrap(shift), scale)
        return (scale * error).square().sum(dim=-1)

    def standardised(self, log_rho: torch.Tensor) -> torch.Tensor:
        """(log rho - mean)/std per block, clamped to [-5, 5]; differentiable inside."""
        mean, std = self.log_radius_mean.to(log_rho.dtype), self.log_radius_std.to(log_rho.dtype)
        return ((log_rho - mean) / std).clamp(-STANDARDISED_LIMIT, STANDARDISED_LIMIT)

    def frozen(self, dtype: torch.dtype, *, compiled: bool = False) -> FrozenScore:
        """The network as it is now, in that dtype, for derivatives to its inputs alone."""
        return FrozenScore(self.network, dtype, compiled=compiled)

    def freeze(self) -> PhasePrior:
        """Fix the weights (Stage II differentiates through the prior, never with respect to it)."""
        self.requires_grad_(False)
        return self.eval()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named arrays for ``model.safetensors``, on the CPU: graph and statistics float64, weights float32."""
        named = {f"graph.{name}": value for name, value in self.graph.tensors().items()}
        named |= {name: getattr(self, name) for name in _STATISTICS}
        named |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return {PREFIX + name: value.detach().cpu().contiguous().clone() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> PhasePrior:
        """The frozen prior that :meth:`tensors` describes; arrays without the prefix ``prior.`` are passed over.

        Raises:
            InputError: an array is missing, unknown, not finite or of the wrong shape; the message names it.
        """
        mine = {name[len(PREFIX) :]: value for name, value in tensors.items() if name.startswith(PREFIX)}
        missing = [name for name in (*_STATISTICS, "network.input.weight") if name not in mine]
        if missing:
            raise InputError(f"the arrays of a phase prior do not fit: missing {[PREFIX + name for name in missing]}")
        graph = PhaseGraph.from_tensors(_under(mine, "graph."))
        weights = _under(mine, "network.")
        unknown = sorted(
            name for name in mine if name not in _STATISTICS and not name.startswith(("graph.", "network."))
        )
        if unknown:
            raise InputError(f"the arrays of a phase prior do not fit: unknown {[PREFIX + name for name in unknown]}")
        width = weights["input.weight"].shape[0]
        blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        prior = cls(graph, *(mine[name] for name in _STATISTICS), width=width, blocks=blocks)
        expected = prior.network.state_dict()
        for name in sorted({*expected, *weights}):
            wanted = list(expected[name].shape) if name in expected else None
            got = list(weights[name].shape) if name in weights else None
            if wanted != got:
                raise InputError(f"{PREFIX}network.{name} has shape {got}, expected {wanted} (None: not there)")
            bad = int((~torch.isfinite(weights[name])).sum())
            if bad:
                raise InputError(f"{PREFIX}network.{name} has {bad} non-finite values: fit the prior again")
        prior.network.load_state_dict(weights)
        return prior.freeze()

    def _spread(self) -> torch.Tensor:
        """How far each phase spreads around the best that its anchor or one partner says of it.

        A wrapped normal of deviation s has resultant exp(-s^2/2); between 0.03 and that of the uniform density.
        """
        strongest = torch.maximum(self.resultant, self.graph.amplitude.max(dim=1).values)
        return (-2 * strongest.clamp(1e-12, 1).log()).sqrt().clamp(SMALLEST_SCALE, math.pi / math.sqrt(3))

    def _check(self, theta: torch.Tensor, log_rho: torch.Tensor) -> None:
        for name, value in (("theta", theta), ("log_rho", log_rho)):
            if value.dim() != 2 or value.shape[1] != self.phases or not value.is_floating_point():
                raise InputError(f"{name} must be floating [n, {self.phases}], got {value.dtype} {list(value.shape)}")
        if len(theta) != len(log_rho):
            raise InputError(f"theta has {len(theta)} rows and log_rho {len(log_rho)}")


def _statistic(name: str, value: torch.Tensor, blocks: int) -> torch.Tensor:
    value = torch.as_tensor(value).detach().to(device="cpu", dtype=torch.float64).clone()
    if tuple(value.shape) != (blocks,) or not bool(torch.isfinite(value).all()):
        raise InputError(f"{PREFIX}{name} must be [{blocks}] and finite, got shape {list(value.shape)}")
    if name == "log_radius_std":
        return torch.where(value > _SMALLEST_STD, value, 1.0)
    if name == "resultant" and not bool(((value >= 0) & (value <= 1 + 1e-9)).all()):
        raise InputError(f"{PREFIX}{name} must lie in [0, 1]")
    return value


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
