"""The learned mixing: blocks whose phases say the same thing in every part of the target (METHOD D3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aniso_ext.align.rows import Rows
from aniso_ext.align.training import RowSampler, TrainingOptions, TrainingRows, train
from aniso_ext.errors import InputError
from aniso_ext.ops.reference import polar

SAMPLE_ROWS = 65536
STAGE = "mixing"
OPTIONS = TrainingOptions(
    steps=200,
    batch_rows=4096,
    learning_rate=0.02,
    warmup_steps=10,
    weight_decay=0.0,
    ema=0.9,
    evaluate_every=20,
    patience=3,
    checkpoint_every=0,
    autocast=False,
)


def phase_stability(coordinates: torch.Tensor) -> torch.Tensor:
    """How much two halves of the rows agree about the phases of the blocks: a scalar, larger is better.

        J = sum_k |m_k|^2 + sum_{k != l} |C_kl|^2, less its variance over halves,
        m_k = E e^{i theta_k}, C_kl = E e^{i (theta_k - theta_l)} - m_k conj(m_l)

    With m = (m' + m'')/2 over two halves, |m|^2 - |m' - m''|^2/4 = Re(m' conj(m'')), and so for C: what is computed is
    the product of the halves, which has no bias from the number of rows.

    Args:
        coordinates: [n, R], n at least 4; even and odd rows are the halves. Differentiable.

    Example:
        >>> import torch
        >>> round(float(phase_stability(torch.tensor([[1.0, 0.0]]).repeat(8, 1))), 6)
        1.0
    """
    if coordinates.dim() != 2 or coordinates.shape[1] % 2 or len(coordinates) < 4:
        raise InputError(f"coordinates must be [n, R], n at least 4 and R even, got {list(coordinates.shape)}")
    first, second = (_directions(coordinates[half::2]) for half in (0, 1))
    marginal = sum((one * two).sum() for one, two in zip(first[0], second[0], strict=True))
    coupling = sum(
        (one * two).sum() - (one * two).diagonal().sum() for one, two in zip(first[1], second[1], strict=True)
    )
    return torch.as_tensor(marginal + coupling)


def learn_mixing(coordinates: torch.Tensor, start: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """An orthogonal W that makes the blocks of ``coordinates @ W`` stable in phase.

    Args:
        coordinates: target rows in the unmixed basis, [n, R]; uncentred, or centred where the frame will be.
        start: the orthogonal [R, R] to start from; it is what comes back if nothing better is found on held-out rows.
        seed: of batches.

    Returns:
        W [R, R], float64, orthogonal to rounding, and a summary: mixing_steps, mixing_best_step,
        mixing_stability_before and _after (:func:`phase_stability` on held-out rows).
    """
    # Held-out and trained halves both need the four rows that a stability takes.
    if len(coordinates) < 100:
        raise InputError(f"mixing='phase_stable' needs at least 100 target rows, got {len(coordinates)}: use 'haar'")
    module = _Mixing(start)
    rows = TrainingRows.split(coordinates.float(), name="coordinates", fingerprint="", seed=seed)
    options = TrainingOptions(**{**vars(OPTIONS), "seed": seed})
    record = train(module, _instability, rows, options, name=STAGE)
    left, _, right = torch.linalg.svd(module.weight.detach().double())
    mixing = start.double() if record.best_step == 0 else left @ right
    return mixing, {
        "mixing_steps": record.steps,
        "mixing_best_step": record.best_step,
        "mixing_stability_before": -record.before["loss"],
        "mixing_stability_after": -record.after["loss"],
    }


def target_coordinates(target: Rows, origin: torch.Tensor, basis: torch.Tensor, *, seed: int) -> torch.Tensor:
    """A sample of (x - origin) Q, float32 [n, R]: one pass over the target rows."""
    sampler = RowSampler(target.count, SAMPLE_ROWS, seed=seed, name=f"{target.name} mixing", share=target.share)
    for batch in target.exact_batches():
        sampler.take((batch - origin) @ basis)
    return target.gathered(sampler.rows())


class _Mixing(nn.Module):
    """An orthogonal matrix as exp(A) W0 with A skew-symmetric and zero at first."""

    weight: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.float().clone())
        nn.utils.parametrizations.orthogonal(self, "weight", orthogonal_map="matrix_exp")

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        return coordinates @ self.weight


def _instability(
    module: _Mixing, batch: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -phase_stability(module(batch)), {}


def _directions(
    coordinates: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Real and imaginary parts of m [M] and of C [M, M]."""
    _, cos, sin = polar(coordinates)
    rows = len(coordinates)
    mean_cos, mean_sin = cos.mean(0), sin.mean(0)
    cos, sin = cos - mean_cos, sin - mean_sin
    real = (cos.T @ cos + sin.T @ sin) / rows
    cross = sin.T @ cos / rows
    return (mean_cos, mean_sin), (real, cross - cross.T)
