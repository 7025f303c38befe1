"""Paired unit embeddings whose modality gap has given constants (METHOD section 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aniso_ext.errors import InputError
from aniso_ext.worlds.calibration import Solution, Wanted, solve
from aniso_ext.worlds.population import log_correlation
from aniso_ext.worlds.spherical import Array, bounded, variances_for_directions

_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class GapWorld:
    """A population of pairs, named by the constants of its modality gap; defaults: METHOD section 1's paper column.

    ``c_lambda``, ``o_q`` (at ``q``), ``g_mu``, ``g_sigma`` (relative Frobenius norm), ``d_center = E||r||²``, ``a_r``
    and ``d_eff_ratio`` are what a measurement on about ``pairs`` rows returns; ``pairs=None`` gives them to the
    population itself. ``r_res = d_center / (d_center + g_mu²)`` follows from two others: left None it is that number,
    given it is checked. ``mean_norm`` (both means; None: ``g_mu / 2``, the least) and ``bulk_pairing`` (correlation of
    the pairs outside the one strong direction) are free. ``seed`` turns the population's axes and changes nothing else.

    Construction solves for the population: about a second at width 1280 the first time, remembered afterwards.

    Raises:
        InputError: the constants exclude each other; the message names the inequality.

    Example:
        >>> world = GapWorld.small()
        >>> round(world.constants()["r_res"], 3)
        0.892
    """

    c_lambda: float = 0.845
    o_q: float = 0.441
    q: int = 128
    g_mu: float = 0.392
    g_sigma: float = 0.066
    d_center: float = 1.264
    r_res: float | None = None
    a_r: float = 28.6
    d_eff_ratio: float = 0.284
    width: int = 1280
    mean_norm: float | None = None
    bulk_pairing: float = 0.0
    pairs: int | None = 13_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        _solution(self._wanted())

    @classmethod
    def small(cls, width: int = 128, **changes: Any) -> GapWorld:
        """A world for tests and demos that draws in milliseconds: the paper's constants where a small width has room.

        ``q = min(128, width/4)`` is the diagnostics' default; ``a_r = 1.2 sqrt(width)`` (1.5 below width 48) because
        ``A_r²/D`` bounds d_eff; ``g_sigma = .15`` because a few thousand pairs cannot show .066. The constants hold on
        3 000 to 8 000 pairs; from width 512 on ``pairs`` grows as ``8 width``.

        Raises:
            InputError: ``width`` is below 24, or a change does not go with the others.
        """
        if width < 24:
            raise InputError(f"width = {width} must be at least 24: narrower worlds need constants chosen for them")
        defaults: dict[str, Any] = {
            "width": width,
            "q": min(128, max(8, width // 4)),
            "a_r": (1.2 if width >= 48 else 1.5) * math.sqrt(width),
            "g_sigma": 0.15,
            "pairs": max(4_000, 8 * width),
        }
        return cls(**{**defaults, **changes})

    def constants(self) -> dict[str, float]:
        """The wanted constants by METHOD's names, ``r_res`` resolved."""
        wanted = {name: getattr(self, name) for name in ("c_lambda", "o_q", "g_mu", "g_sigma", "d_center")}
        r_res = self.d_center / (self.d_center + self.g_mu**2)
        return {**wanted, "r_res": r_res, "a_r": self.a_r, "d_eff_ratio": self.d_eff_ratio}

    def population_constants(self) -> dict[str, float]:
        """The constants of the population, in closed form: what infinitely many pairs would show."""
        solution = _solution(self._wanted())
        shape, residual = solution.population.shape, solution.summary.residual
        total = float(residual.sum())
        return {
            "c_lambda": log_correlation(solution.population.variances_x, solution.population.variances_y),
            "o_q": (1.0 + shape.shared + shape.planes * shape.cos2) / shape.q,
            "g_mu": self.g_mu,
            "g_sigma": solution.summary.g_sigma,
            "d_center": total,
            "r_res": total / (total + self.g_mu**2),
            "a_r": float(residual.max()) * self.width / total,
            "d_eff_ratio": total**2 / float((residual**2).sum()) / self.width,
        }

    def _wanted(self) -> Wanted:
        return Wanted(
            width=self.width,
            q=self.q,
            c_lambda=self.c_lambda,
            o_q=self.o_q,
            g_mu=self.g_mu,
            g_sigma=self.g_sigma,
            d_center=self.d_center,
            a_r=self.a_r,
            d_eff_ratio=self.d_eff_ratio,
            mean_norm=0.5 * self.g_mu if self.mean_norm is None else self.mean_norm,
            bulk_pairing=self.bulk_pairing,
            pairs=self.pairs,
        )


def simulate_gap(
    n: int, *, world: GapWorld | None = None, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw ``n`` pairs from a gap world.

    Rows are independent and of unit norm; row i of the source and row i of the target belong together. METHOD section 1
    names the target ``x`` and the source ``y``. The population depends on ``world`` alone, so draws with different
    ``seed`` are train and held-out rows of one world; of two draws with one ``seed`` the shorter is the beginning of
    the longer (to the rounding of a matrix product).

    Args:
        n: number of pairs, at least 0.
        world: the constants; None is ``GapWorld()``.
        seed: of the rows.

    Returns:
        ``(source, target)``, both ``[n, D]`` float32.

    Raises:
        InputError: ``n`` or ``seed`` is negative.

    Example:
        >>> source, target = simulate_gap(4_000, world=GapWorld.small(), seed=1)
        >>> source.shape, target.dtype.name
        ((4000, 128), 'float32')
    """
    world = GapWorld() if world is None else world
    if n < 0 or seed < 0:
        raise InputError(f"n = {n} and seed = {seed} must not be negative")
    sampler = _sampler(world)
    source = np.empty((n, world.width), dtype=np.float32)
    target = np.empty((n, world.width), dtype=np.float32)
    for start, block in _blocks(n):
        y, x = sampler.draw(block, seed, start // _BLOCK_ROWS)
        source[start : start + block], target[start : start + block] = y, x
    return source, target


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, _BLOCK_ROWS):
        yield start, min(_BLOCK_ROWS, n - start)


def _check_ranges(world: GapWorld) -> None:
    """Ranges of single fields; relations between them are the solver's work."""
    if world.width < 16 or not 4 <= world.q <= world.width // 2:
        raise InputError(f"width = {world.width} must be at least 16 and q = {world.q} in [4, width / 2]")
    open_unit = {"c_lambda": world.c_lambda, "d_eff_ratio": world.d_eff_ratio}
    for name, value in open_unit.items():
        if not 0.0 < value < 1.0:
            raise InputError(f"{name} = {value:g} must lie in (0, 1)")
    if not (0.0 <= world.g_mu < 2.0 and world.g_sigma > 0.0 and world.d_center > 0.0):
        raise InputError(
            f"g_mu = {world.g_mu:g} must lie in [0, 2), g_sigma = {world.g_sigma:g} and d_center = {world.d_center:g} "
            "must be positive"
        )
    if not 0.0 <= world.bulk_pairing < 1.0:
        raise InputError(f"bulk_pairing = {world.bulk_pairing:g} must lie in [0, 1)")
    if world.pairs is not None and world.pairs < 4 * world.width:
        raise InputError(
            f"pairs = {world.pairs} must be at least 4 x width = {4 * world.width}: fewer rows do not determine the "
            "log eigenvalues that C_lambda correlates; pass more, or None for constants of the population"
        )
    implied = world.d_center / (world.d_center + world.g_mu**2)
    if world.r_res is not None and abs(world.r_res - implied) > 0.005:
        raise InputError(
            f"r_res = {world.r_res:g} violates R_res = D_center / (D_center + G_mu²) = {implied:.4f}: leave "
            "r_res=None, or change d_center or g_mu"
        )


@lru_cache(maxsize=16)
def _solution(wanted: Wanted) -> Solution:
    return solve(wanted)


@lru_cache(maxsize=2)
def _sampler(world: GapWorld) -> _Sampler:
    return _Sampler(_solution(world._wanted()), world)


class _Sampler:
    """Draws rows in the population's coordinates and turns them into the world's axes."""

    def __init__(self, solution: Solution, world: GapWorld) -> None:
        population = solution.population
        self.solution, self.shape = solution, population.shape
        self.mean_norm = world._wanted().mean_norm
        self.pairing = world.bulk_pairing
        self.ray_x, self.ray_y = np.sqrt(3.0 * population.bulk_x[0]), np.sqrt(3.0 * population.bulk_y[0])
        self.scale_x = self._direction_scale(population.top_x, population.bulk_x)
        self.scale_y = self._direction_scale(population.top_y, population.bulk_y)
        axes = _random_axes(self.shape.width, world.seed)
        in_plane = np.sqrt(max(0.0, self.mean_norm**2 - 0.25 * world.g_mu**2))
        self.axes_x = self._side_axes(axes, in_plane, 0.5 * world.g_mu, 1.0)
        self.axes_y = self._side_axes(axes, in_plane, -0.5 * world.g_mu, population.shape.cos2)

    @staticmethod
    def _direction_scale(top: Array, bulk: Array) -> NDArray[np.float32]:
        """Gaussian scales of everything but the ray and the strong direction: [shared, heads | mean plane, bulk]."""
        variances = np.concatenate([top[1:], bulk[1:]])
        return np.sqrt(variances_for_directions(variances / variances.sum())).astype(np.float32)

    def _side_axes(self, axes: Array, along: float, across: float, cos2: float) -> NDArray[np.float32]:
        """Axes of one side as rows, in the order ray, strong, shared, heads, the mean plane's second axis, bulk."""
        q, k, p = self.shape.q, self.shape.shared, self.shape.planes
        rows = np.empty_like(axes)
        direction = np.array([along, across]) / self.mean_norm if self.mean_norm > 0 else np.array([1.0, 0.0])
        rows[0] = direction @ axes[:2]
        rows[1 : 1 + q] = axes[2 : 2 + q]
        rows[1 + q] = np.array([-direction[1], direction[0]]) @ axes[:2]
        rows[2 + q :] = axes[2 + q :]
        heads = slice(2 + k, 2 + k + p)
        feet = q + self.solution.population.feet
        cosine, sine = np.sqrt(cos2), np.sqrt(1.0 - cos2)
        rows[heads], rows[feet] = cosine * rows[heads] + sine * rows[feet], cosine * rows[feet] - sine * rows[heads]
        return rows.astype(np.float32)

    def draw(self, rows: int, seed: int, block: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows ``(source, target)`` of one block; a shorter block is the beginning of a longer one."""
        # One generator an array, so that every array is a prefix of the one that a longer block would hold.
        latent, ray, shared, own = (np.random.default_rng([seed, block, stream]) for stream in range(4))
        solution, width = self.solution, self.shape.width
        z = latent.standard_normal((rows, 2))
        z_y = solution.strong_correlation * z[:, 0] + np.sqrt(1.0 - solution.strong_correlation**2) * z[:, 1]
        offset = ray.uniform(-1.0, 1.0, (rows, 2))
        x = shared.standard_normal((rows, width - 2), dtype=np.float32)
        y = own.standard_normal((rows, width - 2), dtype=np.float32)
        if self.pairing:
            rho = np.where(np.arange(width - 2) == self.shape.q - 1, 0.0, self.pairing).astype(np.float32)
            y = rho * x + np.sqrt(1.0 - rho**2) * y
        target = self._place(
            x * self.scale_x, offset[:, 0] * self.ray_x, bounded(z[:, 0], solution.bend_x), self.axes_x
        )
        source = self._place(y * self.scale_y, offset[:, 1] * self.ray_y, bounded(z_y, solution.bend_y), self.axes_y)
        return source, target

    def _place(self, g: NDArray[np.float32], offset: Array, w: Array, axes: NDArray[np.float32]) -> NDArray[np.float32]:
        """``ray m^ + sqrt(1 - ray²) (w e + sqrt(1 - w²) g/|g|)`` in the world's axes, ``[rows, D]``."""
        ray = self.mean_norm + offset
        along = np.sqrt(1.0 - ray**2)
        length = np.sqrt(np.einsum("ij,ij->i", g, g, dtype=np.float64))
        coordinates = np.empty((g.shape[0], g.shape[1] + 2), dtype=np.float32)
        coordinates[:, 0], coordinates[:, 1] = ray, along * w
        np.multiply(g, (along * np.sqrt(1.0 - w**2) / length)[:, None].astype(np.float32), out=coordinates[:, 2:])
        rows = coordinates @ axes
        rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))[:, None].astype(np.float32)
        return rows


def _random_axes(width: int, seed: int) -> Array:
    """A Haar orthonormal basis, rows; the signs of QR are fixed so that the basis does not depend on the library."""
    q, r = np.linalg.qr(np.random.default_rng([seed, width]).standard_normal((width, width)))
    return q * np.sign(np.diag(r))
