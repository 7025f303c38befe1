"""The baselines of METHOD section 5, from doing nothing to optimal transport between Gaussians.

Letters: y a source row, m_s and m_t the means and S_s and S_t the covariances of source and target, Norm(y) = y/|y|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from aniso_ext.align.base import Aligner, Arrays, Fields
from aniso_ext.align.moments import first_moments, full_moments
from aniso_ext.align.noise import row_choice, row_noise
from aniso_ext.align.registry import register
from aniso_ext.align.rows import Rows, normalize, normalize_
from aniso_ext.errors import InputError


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")


def _check_noise(noise_std: Any) -> None:
    if isinstance(noise_std, bool) or not isinstance(noise_std, (int, float, np.floating)):
        raise InputError(f"noise_std must be a number, got {noise_std!r}")
    if not (math.isfinite(noise_std) and noise_std >= 0):
        raise InputError(f"noise_std must be finite and not negative, got {noise_std!r}")


@register("identity")
class Identity(Aligner):
    """z = y: the source rows unchanged, bit for bit. Fitting only records the width and the gap of the means.

    Example:
        >>> import numpy as np
        >>> rows = np.eye(3)
        >>> bool((Identity().fit(rows, rows).transform(rows) == rows).all())
        True
    """

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        _, _, summary = first_moments(source, target)
        return {}, summary

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()


@register("mean_shift")
class MeanShift(Aligner):
    """z = Norm(y - m_s + m_t): the centroid moved, nothing else.

    Example:
        >>> import numpy as np
        >>> source, target = np.eye(2), -np.eye(2)
        >>> MeanShift().fit(source, target).transform(source).tolist()
        [[0.0, -1.0], [-1.0, 0.0]]
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",), "target_mean": ("D",)}

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, target_moments, summary = first_moments(source, target)
        return {"source_mean": source_moments.mean, "target_mean": target_moments.mean}, summary

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(self._shifted(rows))

    def _shifted(self, rows: torch.Tensor) -> torch.Tensor:
        return rows - (self._constant("source_mean", rows) - self._constant("target_mean", rows))


@register("c3_paper")
class C3Paper(MeanShift):
    """C3 as its paper describes it: z = Norm(y - m_s + m_t + s n), n standard normal.

    The noise of a row is a function of ``seed`` and of the row's values alone (:mod:`aniso_ext.align.noise`): it does
    not depend on how rows are split into batches, and equal rows get equal noise.

    Args:
        noise_std: s, per coordinate; the expected length of the noise is s sqrt(D). The default keeps Phi near .9, the
            value published for C3 (METHOD section 1); for training, tune it.
        seed: of the noise.
    """

    transform_options = ("noise_std", "seed")

    def __init__(self, *, noise_std: float = 0.02, seed: int = 0) -> None:
        self.noise_std = noise_std
        self.seed = seed

    def _check_options(self) -> None:
        _check_noise(self.noise_std)
        _check_seed(self.seed)

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(self._shifted(rows) + self.noise_std * row_noise(rows, self.seed))


@register("c3_code")
class C3Code(Aligner):
    """C3 as its code computes it: z = Norm(y - m_s + s n); the row's own mean is removed and none is added.

    Its target rows are meant to lose their own mean as well: compare with Norm(x - m_t), ``target_mean_`` is kept for
    that. With ``calibration="corpus"`` m_s is the mean of the corpus that is transformed. Noise as in ``c3_paper``.

    Args:
        noise_std: s, per coordinate; the expected length of the noise is s sqrt(D).
        seed: of the noise.
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",), "target_mean": ("D",)}
    transform_options = ("noise_std", "seed")

    def __init__(self, *, noise_std: float = 0.02, seed: int = 0) -> None:
        self.noise_std = noise_std
        self.seed = seed

    def _check_options(self) -> None:
        _check_noise(self.noise_std)
        _check_seed(self.seed)

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, target_moments, summary = first_moments(source, target)
        return {"source_mean": source_moments.mean, "target_mean": target_moments.mean}, summary

    @property
    def corpus_passes(self) -> int:
        return 1

    def _corpus_sums(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        return batch.sum(dim=0, dtype=torch.float64)

    def _corpus_arrays(self, mean: torch.Tensor, number: int) -> Arrays:
        return {"source_mean": mean}

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        centred = rows - self._constant("source_mean", rows)
        return normalize(centred + self.noise_std * row_noise(rows, self.seed))


@register("unicorn")
class Unicorn(Aligner):
    """z = y - m_s, not renormalised: the own mean is removed and the rows leave the sphere.

    With ``calibration="corpus"`` m_s is the mean of the corpus that is transformed.
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",)}

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, _, summary = first_moments(source, target)
        return {"source_mean": source_moments.mean}, summary

    @property
    def corpus_passes(self) -> int:
        return 1

    def _corpus_sums(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        return batch.sum(dim=0, dtype=torch.float64)

    def _corpus_arrays(self, mean: torch.Tensor, number: int) -> Arrays:
        return {"source_mean": mean}

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        return rows - self._constant("source_mean", rows)


@register("realign")
class ReAlign(Aligner):
    """ReAlign: anchor and trace scale e' = Norm(m_t + s (y - m_s)), s = sqrt(tr S_t / tr S_s), then the centroid
    z = Norm(e' - m_hat + m_t), m_hat the mean of e' over the source corpus.

    With ``calibration="corpus"`` m_hat is taken over the corpus that is transformed; None stops at e'.
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",), "target_mean": ("D",), "scale": ("1",), "output_mean": ("D",)}
    optional_fields = frozenset({"output_mean"})

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, target_moments, summary = first_moments(source, target)
        scale = (target_moments.trace / source_moments.trace) ** 0.5 if source_moments.trace > 0 else 1.0
        arrays = {
            "source_mean": source_moments.mean,
            "target_mean": target_moments.mean,
            "scale": torch.tensor([scale], dtype=torch.float64),
        }
        arrays["output_mean"] = source.mean(partial(_anchor, **arrays))
        return arrays, summary | {"trace_scale": scale}

    @property
    def corpus_passes(self) -> int:
        return 1

    def _corpus_sums(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        exact = batch.to(torch.float64)
        return _anchor(exact, **self._anchor_constants(exact)).sum(dim=0)

    def _corpus_arrays(self, mean: torch.Tensor, number: int) -> Arrays:
        return {"output_mean": mean}

    def _check_arrays(self, arrays: Arrays) -> None:
        if float(arrays["scale"]) < 0:
            raise InputError(f"scale must not be negative, got {float(arrays['scale'])}")

    def _anchor_constants(self, like: torch.Tensor) -> Arrays:
        return {name: self._constant(name, like) for name in ("source_mean", "target_mean", "scale")}

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        constants = self._anchor_constants(rows)
        anchored = _anchor(rows, **constants)
        if not hasattr(self, "output_mean_"):
            return anchored
        return normalize_(anchored.sub_(self._constant("output_mean", rows)).add_(constants["target_mean"]))


def _anchor(
    rows: torch.Tensor, source_mean: torch.Tensor, target_mean: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    # in place: fresh memory for every step would take longer than the steps
    return normalize_((rows - source_mean).mul_(scale).add_(target_mean))


@register("gaussian_monge")
class GaussianMonge(Aligner):
    """Optimal transport between Gaussians: z = Norm(m_t + T (y - m_s)), T S_s T = S_t, T symmetric and positive.

    T = S_s^{-1/2} (S_s^{1/2} S_t S_s^{1/2})^{1/2} S_s^{-1/2}. Directions in which the source has no variance (relative
    eigenvalue below ``D`` float64 epsilons) are mapped to zero.

    Args:
        normalize: False leaves out Norm, so that the covariance of the result is S_t exactly on the fitted rows.
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",), "target_mean": ("D",), "transport": ("D", "D")}
    transform_options = ("normalize",)

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize

    def _check_options(self) -> None:
        if not isinstance(self.normalize, bool):
            raise InputError(f"normalize must be True or False, got {self.normalize!r}")

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, target_moments, summary = full_moments(source, target)
        values, vectors = torch.linalg.eigh(source_moments.covariance)
        kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
        root = torch.where(kept, values, 0).sqrt()
        inverse_root = torch.where(kept, 1 / torch.where(kept, root, 1), 0)
        half = (vectors * root) @ vectors.T
        middle_values, middle_vectors = torch.linalg.eigh(half @ target_moments.covariance @ half)
        middle = (middle_vectors * middle_values.clamp_min(0).sqrt()) @ middle_vectors.T
        whiten = (vectors * inverse_root) @ vectors.T
        transport = whiten @ middle @ whiten
        arrays = {
            "source_mean": source_moments.mean,
            "target_mean": target_moments.mean,
            "transport": (transport + transport.T) / 2,
        }
        return arrays, summary | {"source_rank": int(kept.sum())}

    def _check_arrays(self, arrays: Arrays) -> None:
        transport = arrays["transport"]
        if float((transport - transport.T).abs().max()) > 1e-8 * float(transport.abs().max()):
            raise InputError("transport must be symmetric")

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        moved = (rows - self._constant("source_mean", rows)) @ self._constant("transport", rows)
        moved = moved + self._constant("target_mean", rows)
        return normalize(moved) if self.normalize else moved


@register("per_dim_std")
class PerDimensionStd(Aligner):
    """z = Norm(m_t + (std_t / std_s) (y - m_s)), standard deviations per coordinate; 1 where the source is constant.

    Args:
        normalize: False leaves out Norm, so that mean and deviations of the result are the target's on the fitted rows.
    """

    fields: ClassVar[Fields] = {"source_mean": ("D",), "target_mean": ("D",), "scale": ("D",)}
    transform_options = ("normalize",)

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize

    def _check_options(self) -> None:
        if not isinstance(self.normalize, bool):
            raise InputError(f"normalize must be True or False, got {self.normalize!r}")

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        source_moments, target_moments, summary = first_moments(source, target)
        varies = source_moments.std > 0
        scale = torch.where(varies, target_moments.std / torch.where(varies, source_moments.std, 1), 1)
        arrays = {"source_mean": source_moments.mean, "target_mean": target_moments.mean, "scale": scale}
        return arrays, summary | {"smallest_scale": float(scale.min()), "largest_scale": float(scale.max())}

    def _check_arrays(self, arrays: Arrays) -> None:
        if bool((arrays["scale"] < 0).any()):
            raise InputError(f"scale must not be negative, column {int((arrays['scale'] < 0).nonzero()[0])} is")

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        centred = rows - self._constant("source_mean", rows)
        moved = centred * self._constant("scale", rows) + self._constant("target_mean", rows)
        return normalize(moved) if self.normalize else moved


@register("permuted")
class Permuted(Aligner):
    """Negative control: each source row becomes a random target row, so that nothing of the row survives.

    ``fit`` keeps a random sample of target rows; which of them a source row gets is a function of ``seed`` and of the
    row's values alone, whatever the batches are. Draws are with replacement, and equal rows get equal draws.

    Args:
        kept_rows: most target rows to keep, stored in float32.
        seed: of the sample and of the draws.
    """

    fields: ClassVar[Fields] = {"target_rows": ("P", "D")}
    field_dtypes: ClassVar[Mapping[str, torch.dtype]] = {"target_rows": torch.float32}
    transform_options = ("seed",)

    target_rows_: torch.Tensor

    def __init__(self, *, kept_rows: int = 8192, seed: int = 0) -> None:
        self.kept_rows = kept_rows
        self.seed = seed

    def _check_options(self) -> None:
        if isinstance(self.kept_rows, bool) or not isinstance(self.kept_rows, (int, np.integer)) or self.kept_rows < 1:
            raise InputError(f"kept_rows must be a positive integer, got {self.kept_rows!r}")
        _check_seed(self.seed)

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        _, _, summary = first_moments(source, target)
        kept = min(int(self.kept_rows), target.count)
        chosen = np.sort(np.random.default_rng(self.seed).choice(target.count, kept, replace=False))
        parts, start = [], target.share[0]
        for batch in target.batches():
            inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
            parts.append(batch[torch.from_numpy(inside).to(batch.device)].to(device="cpu", dtype=torch.float32))
            start += len(batch)
        return {"target_rows": target.gathered(torch.cat(parts))}, summary | {"kept_target_rows": kept}

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        chosen = row_choice(rows, self.seed, len(self.target_rows_))
        return self.target_rows_[chosen.cpu()].to(device=rows.device, dtype=rows.dtype)
