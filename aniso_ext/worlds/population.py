"""The population behind a gap world: two covariances in one basis, and their pairing.

In coordinates (columns of one random orthonormal basis; ``q``, ``D`` as in METHOD section 1)

    2         the plane of the two means,
    1         the strong direction, shared and paired: carries lambda_max of S_r and most of tr S_xy,
    k         shared directions, the same variance on both sides: set d_eff,
    2p        p = q - 1 - k planes; each side has one strong axis, the target's turned by an angle: set O_q and G_Sigma,
    the rest  a plateau that ends in a cliff, at another place on each side: sets C_lambda.

`docs/simulator.md` derives why the constants leave room for this and which inequality each refusal names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aniso_ext.worlds.spherical import Array


@dataclass(frozen=True)
class Shape:
    """The free numbers of the family; everything else follows from them and the traces."""

    width: int
    shared: int
    planes: int
    trace: float
    strong_x: float
    strong_y: float
    strong_cross: float
    head: float
    boost: float
    cos2: float
    cliff: float
    split: float
    drop: float
    pairing: float

    @property
    def q(self) -> int:
        return 1 + self.shared + self.planes


@dataclass(frozen=True)
class Population:
    """Variances of both sides in adapted coordinates: ``[strong, shared k, plane heads p | D - q bulk, descending]``.

    In the bulk the first two entries are the mean plane, the positions ``feet`` the second axes of the ``p`` planes and
    the positions ``tail`` everything else.
    """

    shape: Shape
    top_x: Array
    top_y: Array
    bulk_x: Array
    bulk_y: Array
    feet: np.ndarray
    tail: np.ndarray

    @property
    def variances_x(self) -> Array:
        return np.concatenate([self.top_x, self.bulk_x])

    @property
    def variances_y(self) -> Array:
        return np.concatenate([self.top_y, self.bulk_y])


def build(shape: Shape) -> Population:
    """Lay out the variances of a shape; bulk levels follow from the traces."""
    size = shape.width - shape.q
    u = (np.arange(size) + 0.5) / size
    geometric = shape.boost ** (1.0 - np.arange(shape.shared) / max(1, shape.shared))
    common = np.concatenate([shape.head * geometric, np.full(shape.planes, shape.head)])

    def bulk(strong: float, cliff: float) -> Array:
        profile = np.exp(-shape.drop / (1.0 + np.exp(-(u - cliff) / 0.03)) - 0.5 * u)
        return profile * max(1e-9, shape.trace - strong - common.sum()) / profile.sum()

    bulk_x = bulk(shape.strong_x, shape.cliff + 0.5 * shape.split)
    bulk_y = bulk(shape.strong_y, shape.cliff - 0.5 * shape.split)
    feet = 2 + np.round(np.linspace(0, size - 3, shape.planes)).astype(int) if shape.planes else np.zeros(0, dtype=int)
    is_tail = np.ones(size, dtype=bool)
    is_tail[:2] = is_tail[feet] = False
    tail = np.flatnonzero(is_tail)
    top_x, top_y = (np.concatenate([[strong], common]) for strong in (shape.strong_x, shape.strong_y))
    return Population(shape, top_x, top_y, bulk_x, bulk_y, feet, tail)


def plane_blocks(population: Population) -> tuple[Array, Array, Array]:
    """``S_x``, ``S_y`` and ``S_xy`` of every plane, each ``[p, 2, 2]`` in the source's axes."""
    k, p = population.shape.shared, population.shape.planes
    x = np.stack([population.top_x[1 + k :], population.bulk_x[population.feet]], axis=1)
    y = np.stack([population.top_y[1 + k :], population.bulk_y[population.feet]], axis=1)
    cosine = np.sqrt(population.shape.cos2)
    sine = np.sqrt(1.0 - population.shape.cos2)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    s_x = np.zeros((p, 2, 2))
    s_x[:, 0, 0], s_x[:, 1, 1] = x.T
    s_y = np.einsum("ab,pb,cb->pac", turn, y, turn)
    s_xy = population.shape.pairing * np.einsum("pa,ba,pa->pab", np.sqrt(x), turn, np.sqrt(y))
    return s_x, s_y, s_xy


@dataclass(frozen=True)
class Summary:
    """Exact population quantities that the constants are made of.

    ``diagonal`` holds the eigenvalues of ``S_r`` outside the planes, the strong direction's first, and ``planes`` the
    2x2 blocks inside them.
    """

    norm_x: float
    difference: float
    cross_trace: float
    diagonal: Array
    planes: Array

    @property
    def g_sigma(self) -> float:
        return float(np.sqrt(self.difference / self.norm_x))

    @property
    def residual_square(self) -> float:
        """``tr S_r²``."""
        return float((self.diagonal**2).sum() + (self.planes**2).sum())

    @property
    def residual(self) -> Array:
        """The eigenvalues of ``S_r``."""
        return np.concatenate([self.diagonal, np.linalg.eigvalsh(self.planes).ravel()])


def summarise(population: Population) -> Summary:
    """``‖S_x‖²_F``, ``‖S_x - S_y‖²_F``, the paired trace outside the strong direction, and ``S_r``."""
    shape, tail = population.shape, population.tail
    k, rho = shape.shared, population.shape.pairing
    s_x, s_y, s_xy = plane_blocks(population)
    x, y = population.bulk_x[tail], population.bulk_y[tail]
    shared = population.top_x[1 : 1 + k]
    strong = np.array([shape.strong_x + shape.strong_y - 2.0 * shape.strong_cross])
    means = population.bulk_x[:2] + population.bulk_y[:2]
    difference = (
        (shape.strong_x - shape.strong_y) ** 2
        + float(((s_x - s_y) ** 2).sum())
        + float(((population.bulk_x[:2] - population.bulk_y[:2]) ** 2).sum())
        + float(((x - y) ** 2).sum())
    )
    return Summary(
        norm_x=float((population.variances_x**2).sum()),
        difference=difference,
        cross_trace=float(rho * (shared.sum() + np.sqrt(x * y).sum()) + np.einsum("paa->", s_xy)),
        diagonal=np.concatenate([strong, 2.0 * (1.0 - rho) * shared, means, x + y - 2.0 * rho * np.sqrt(x * y)]),
        planes=s_x + s_y - s_xy - s_xy.transpose(0, 2, 1),
    )


def log_correlation(a: Array, b: Array) -> float:
    """Pearson correlation of the sorted log eigenvalues (C_lambda)."""
    return float(np.corrcoef(np.log(np.sort(a)), np.log(np.sort(b)))[0, 1])


def spectrum_bias(x: Array, y: Array, samples: float) -> float:
    """How much larger C_lambda is on ``samples`` rows than in the population.

    The limit law of sample eigenvalues depends on the distribution of the variances and on ``D / samples`` alone, so
    every m-th variance with ``samples / m`` rows shows it. Two fixed Wishart draws are averaged.
    """
    thinning = max(1, round(x.size / 256))
    x, y = x[::thinning], y[::thinning]
    generator = np.random.default_rng(0)
    exact = log_correlation(x, y)
    return float(np.mean([_wishart_correlation(x, y, samples / thinning, generator) - exact for _ in range(2)]))


def _wishart_correlation(x: Array, y: Array, samples: float, generator: np.random.Generator) -> float:
    """C_lambda between one Wishart sample of each spectrum (Bartlett: O(D³), whatever ``samples`` is)."""

    def spectrum(variances: Array) -> Array:
        factor = np.tril(generator.standard_normal((variances.size, variances.size)), -1)
        factor[np.diag_indices(variances.size)] = np.sqrt(generator.chisquare(samples - np.arange(variances.size)))
        factor *= np.sqrt(variances / samples)[:, None]
        return np.linalg.eigvalsh(factor @ factor.T)

    return log_correlation(spectrum(x), spectrum(y))


def subspace_leak(top: Array, bulk: Array, samples: float) -> tuple[Array, Array]:
    """Expected diagonal of the sample top-q projector, to first order in ``1/samples``: over ``top`` and over ``bulk``.

    Entry ``i`` of the top loses ``sum_j l_i l_j / (n (l_i - l_j)²)`` to the bulk entries ``j``.
    """
    loss = np.outer(top, bulk) / (samples * (top[:, None] - bulk[None, :]) ** 2)
    return np.clip(1.0 - loss.sum(axis=1), 0.0, 1.0), np.clip(loss.sum(axis=0), 0.0, 1.0)


def cos2_for_overlap(population: Population, overlap: float, samples: float | None) -> float:
    """The squared cosine of the plane angle at which ``samples`` rows show ``O_q = overlap`` (may leave [0, 1])."""
    shape = population.shape
    if samples is None:
        return (shape.q * overlap - 1 - shape.shared) / shape.planes
    top_x, bulk_x = subspace_leak(population.top_x, population.bulk_x, samples)
    top_y, bulk_y = subspace_leak(population.top_y, population.bulk_y, samples)
    s = 1 + shape.shared
    fixed = top_x[:s] @ top_y[:s] + bulk_x[population.tail] @ bulk_y[population.tail]
    aligned = top_x[s:] @ top_y[s:] + bulk_x[population.feet] @ bulk_y[population.feet]
    crossed = top_x[s:] @ bulk_y[population.feet] + bulk_x[population.feet] @ top_y[s:]
    return float((shape.q * overlap - fixed - crossed) / (aligned - crossed))
