"""A planted world: pairs whose target phases follow a known coupled density and whose source is a known move of them.

Population (letters of METHOD). The M blocks of a planted basis Q fall into groups of ``size``. In each group

    theta_root ~ vM(psi, anchor)                              anchor = 0: uniform
    theta_k = theta_root + eta_k + vM(0, concentration)       independent given the root, the other blocks of the group

    target row = sqrt(share) Q (rho, theta) + sqrt(1 - share) B v_x,      rho^2 ~ Dirichlet(evenness, ..., evenness)
    source row = sqrt(source_share) Q (rho, theta + twist) + sqrt(1 - source_share) B v_y

B completes Q and (v_y, v_x) are pairs of the gap simulator: every row has unit norm, and the gaps of means and of
covariances lie in the complement. The radius map from source to target is the factor sqrt(share/source_share) of every
block. With r(kappa) = I_1(kappa)/I_0(kappa), r_k = r(concentration) or 1 at a root, and eta = 0 there, everything that
Stage I estimates is known:

    E e^{i theta_k} = r_k r(anchor) e^{i (psi + eta_k)}
    E e^{i (theta_k - theta_l)} = r_k r_l e^{i (eta_k - eta_l)} inside a group, else E e^{i theta_k} E e^{-i theta_l}

Which twist can be undone
-------------------------
With an exact score network, L_II at noise scale s is, up to a constant and the factor s^2, the mean over the rows of

    h(theta^) = E_noise [ |grad log p_s|^2 + 2 lap log p_s ]            p_s: the drifted target density, diffused by s

No pairing enters, only where theta^ lies in the target's density.

- Turns that are the same for all rows are isometries of the torus: turning the rows by t is turning the density by -t.
  h is Hyvärinen's score, which is strictly proper: up to the drift, its mean over rows of the density turned by c is
  least after a turn by -c, however broad the density is, and among such turns nowhere else, except for turns that leave
  the density as it is. Training finds it first, because the gradients of all rows agree on it. That is ``offsets``. How
  far it gets depends on the spread: what the score weighs a turn with falls as 1/spread^2, while L_Phi and moves that
  differ from row to row pull elsewhere.
- A common turn of a group leaves its differences alone. Only the anchor sees it, through a Fisher information of
  anchor r(anchor), which is 0 if the root is uniform, against concentration r(concentration) for a difference. That is
  ``common``: not identified for uniform roots, and hardly for broad ones.
- A twist drawn anew for each row, ``jitter``, leaves a broadened density. Moves that differ from row to row change
  volumes; for them h is no proper score, and it is least with each row at a mode: the row's own deviation is lost with
  its twist. Where the twist exceeds the spread that would still help, but the network would have to learn the shape of
  every group, and the schedule of a fit does not get there.

The bound acts on top: a twist beyond a_theta is undone up to a_theta. L_Phi holds back changes of a difference that
has an edge, and so the offsets too; at its weight of 1 it is too weak to keep them where the density is sharp.
``benchmarks/planted_twist.py`` measures all three at spreads from 0.03 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from aniso_ext.errors import InputError
from aniso_ext.worlds.gap import GapWorld, simulate_gap
from aniso_ext.worlds.spherical import Array

if TYPE_CHECKING:
    from aniso_ext.ops import Frame

TWISTS = ("offsets", "jitter", "common", "none")


@dataclass(frozen=True)
class PlantedRows:
    """A draw: row i of every array belongs together.

    Attributes:
        source, target: [n, D] float32, unit rows.
        phases: theta of the target, [n, M] in [-pi, pi).
        radii: rho of the target's unit vector in the basis, [n, M]; squares sum to 1.
        twist: what was added to the phases of the source, [n, M], at most ``PlantedWorld.bound``.
    """

    source: NDArray[np.float32]
    target: NDArray[np.float32]
    phases: Array
    radii: Array
    twist: Array

    def unpaired(self, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Source and target shuffled apart."""
        rng = np.random.default_rng([seed, len(self.source)])
        return self.source[rng.permutation(len(self.source))], self.target[rng.permutation(len(self.target))]


@dataclass(frozen=True)
class PlantedWorld:
    """The constants of a planted world; the module's text gives the formulas and what can be undone.

    Args:
        groups, size: blocks in ``groups`` groups of ``size``; M is their product, R twice that.
        spread: sigma, deviation of a phase around its root, radians; the concentration is 1/sigma^2.
        anchor: concentration of the roots of every other group; the roots of the rest are uniform.
        twist: ``offsets`` (one number a block, half of a group +bound and half -bound), ``jitter`` (the
            same signs in a random order of the group's blocks for each row),
            ``common`` (+bound for every block of every other group, -bound for the rest) or ``none``.
        bound: largest twist, radians.
        evenness: of the Dirichlet law of rho^2; large values make the radii equal.
        share, source_share: energy of the rows inside the basis.
        complement: the gap world of the complement; its width is D - R. None is ``GapWorld.small(32)``.
        seed: of the basis, the edges' offsets, the anchors and the signs of the twist.

    Raises:
        InputError: an option is out of range.

    Example:
        >>> world = PlantedWorld(groups=2, size=3)
        >>> rows = world.draw(500, seed=1)
        >>> rows.target.shape, world.edges.shape, float(abs(rows.twist).max())
        ((500, 44), (6, 2), 0.1)
    """

    groups: int = 4
    size: int = 4
    spread: float = 0.1
    anchor: float = 1.0
    twist: str = "offsets"
    bound: float = 0.1
    evenness: float = 20.0
    share: float = 0.8
    source_share: float = 0.7
    complement: GapWorld | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.twist not in TWISTS:
            raise InputError(f"twist must be one of {', '.join(TWISTS)}, got {self.twist!r}")
        if not (self.spread > 0 and self.anchor >= 0 and self.evenness > 0 and 0 <= self.bound <= math.pi):
            raise InputError(
                "spread and evenness must be positive, anchor not negative and bound in [0, pi], got "
                f"{self.spread!r}, {self.evenness!r}, {self.anchor!r} and {self.bound!r}"
            )
        if not (0 < self.share < 1 and 0 < self.source_share < 1):
            raise InputError(f"share {self.share!r} and source_share {self.source_share!r} must lie between 0 and 1")

    @property
    def blocks(self) -> int:
        """M."""
        return self.groups * self.size

    @property
    def width(self) -> int:
        """D."""
        return 2 * self.blocks + self._gap.width

    @property
    def basis(self) -> Array:
        """Q [D, 2M]: block k is columns 2k and 2k + 1."""
        return self._axes[:, : 2 * self.blocks]

    @property
    def group_of(self) -> NDArray[np.int64]:
        """The group of each block, [M]; blocks of a group are spread over the block numbers."""
        order = np.random.default_rng([self.seed, 1]).permutation(self.blocks)
        return (order % self.groups).astype(np.int64)

    @property
    def edges(self) -> NDArray[np.int64]:
        """[E, 2], k < l: the pairs whose difference the density holds, which are those inside a group."""
        group = self.group_of
        return np.argwhere(np.triu(group[:, None] == group[None, :], k=1))

    @property
    def offsets(self) -> Array:
        """eta_k [M], 0 at the roots."""
        eta = np.random.default_rng([self.seed, 2]).uniform(-math.pi, math.pi, self.blocks)
        return np.where(self._is_root, 0.0, eta)

    @property
    def anchors(self) -> Array:
        """psi + eta_k [M], the mean direction of each block's phase; of no meaning where the root is uniform."""
        psi = np.random.default_rng([self.seed, 3]).uniform(-math.pi, math.pi, self.groups)
        return np.angle(np.exp(1j * (psi[self.group_of] + self.offsets)))

    @property
    def first(self) -> NDArray[np.complex128]:
        """E e^{i theta_k} [M]."""
        rooted = np.where(self._concentrations > 0, resultant(self._concentrations), 0.0)[self.group_of]
        return self._own * rooted * np.exp(1j * self.anchors)

    @property
    def second(self) -> NDArray[np.complex128]:
        """E e^{i (theta_k - theta_l)} [M, M]."""
        group, own = self.group_of, self._own * np.exp(1j * self.offsets)
        inside = np.outer(own, own.conj())
        coupled = np.where(group[:, None] == group[None, :], inside, np.outer(self.first, self.first.conj()))
        np.fill_diagonal(coupled, 1.0)
        return coupled

    def draw(self, n: int, *, seed: int = 0) -> PlantedRows:
        """Draw ``n`` rows: exact samples of the density, the twist and the rows built from both."""
        # one generator each: worlds that differ in the twist alone have the same target
        laws = [np.random.default_rng([self.seed, 4, seed, stream]) for stream in range(3)]
        phases, twist = self._phases(n, laws[0]), self._twists(n, laws[1])
        radii = np.sqrt(laws[2].dirichlet(np.full(self.blocks, self.evenness), size=n))
        outside_source, outside_target = simulate_gap(n, world=self._gap, seed=seed)
        return PlantedRows(
            source=self.build(radii, phases + twist, outside_source, self.source_share),
            target=self.build(radii, phases, outside_target, self.share),
            phases=phases,
            radii=radii,
            twist=twist,
        )

    def build(self, radii: Array, phases: Array, outside: NDArray[Any], share: float) -> NDArray[np.float32]:
        """Rows [n, D] of polar coordinates [n, M] and unit rows of the complement [n, D - R]."""
        coordinates = np.stack((radii * np.cos(phases), radii * np.sin(phases)), axis=2).reshape(len(radii), -1)
        axes = self._axes
        rows = math.sqrt(share) * coordinates @ axes[:, : 2 * self.blocks].T
        return (rows + math.sqrt(1 - share) * outside @ axes[:, 2 * self.blocks :].T).astype(np.float32)

    def phases_of(self, rows: Any) -> Array:
        """Phases [n, M] of rows [n, D] in the planted basis."""
        coordinates = np.asarray(rows, dtype=np.float64) @ self.basis
        return np.arctan2(coordinates[:, 1::2], coordinates[:, 0::2])

    def frame(self, source: Any, target: Any, *, knots: int = 256) -> Frame:
        """The frame that a fit finds for two unpaired sets if it is told the basis; uncalibrated, float64."""
        from aniso_ext.align.fitting import complement_scale, radius_knots
        from aniso_ext.align.moments import full_moments
        from aniso_ext.align.rows import open_rows
        from aniso_ext.ops import Frame

        basis = torch.from_numpy(np.ascontiguousarray(self.basis))
        source_rows, target_rows = open_rows(source, "source"), open_rows(target, "target")
        source_moments, target_moments, _ = full_moments(source_rows, target_rows)
        shift = target_moments.mean - source_moments.mean
        return Frame(
            source_mean=source_moments.mean,
            target_mean=target_moments.mean,
            basis=basis,
            radius_source_knots=radius_knots(source_rows, shift, basis, knots),
            radius_target_knots=radius_knots(target_rows, torch.zeros_like(shift), basis, knots),
            complement_scale=complement_scale(source_moments, target_moments, basis, "scalar"),
        ).validate()

    @property
    def _gap(self) -> GapWorld:
        return GapWorld.small(32) if self.complement is None else self.complement

    @property
    def _axes(self) -> Array:
        """A Haar orthonormal basis [D, D], columns."""
        drawn = np.random.default_rng([self.seed, 0]).standard_normal((self.width, self.width))
        q, r = np.linalg.qr(drawn)
        return q * np.sign(np.diag(r))

    @property
    def _rank(self) -> NDArray[np.int64]:
        """Place of each block in its group, [M]: 0 is the root."""
        group = self.group_of
        return np.array([int((group[:k] == group[k]).sum()) for k in range(self.blocks)])

    @property
    def _is_root(self) -> NDArray[np.bool_]:
        return self._rank == 0

    @property
    def _own(self) -> Array:
        """r_k [M]: 1 at the roots."""
        concentration = np.full(1, 1 / self.spread**2)
        return np.where(self._is_root, 1.0, resultant(concentration)[0])

    @property
    def _concentrations(self) -> Array:
        """Of the roots, [groups]."""
        return np.where(np.arange(self.groups) % 2 == 0, self.anchor, 0.0)

    def _phases(self, n: int, rng: np.random.Generator) -> Array:
        centres = np.random.default_rng([self.seed, 3]).uniform(-math.pi, math.pi, self.groups)
        roots = rng.vonmises(centres, self._concentrations, (n, self.groups))
        around = rng.vonmises(0.0, 1 / self.spread**2, (n, self.blocks))
        phases = roots[:, self.group_of] + np.where(self._is_root, 0.0, self.offsets + around)
        return np.angle(np.exp(1j * phases))

    def _twists(self, n: int, rng: np.random.Generator) -> Array:
        group = self.group_of
        if self.twist == "none":
            return np.zeros((n, self.blocks))
        if self.twist == "common":
            return np.broadcast_to(self.bound * np.where(group % 2 == 0, 1.0, -1.0), (n, self.blocks)).copy()
        signs = np.where(self._rank % 2 == 0, 1.0, -1.0)
        if self.twist == "offsets":
            return np.broadcast_to(self.bound * signs, (n, self.blocks)).copy()
        drawn = np.empty((n, self.blocks))
        for number in range(self.groups):
            members = np.flatnonzero(group == number)
            drawn[:, members] = rng.permuted(np.broadcast_to(signs[members], (n, self.size)), axis=1)
        return self.bound * drawn


def resultant(concentration: Array) -> Array:
    """r(kappa) = I_1(kappa)/I_0(kappa), the resultant length of a von Mises law, elementwise.

    Example:
        >>> resultant(np.array([0.0, 2.0])).round(4).tolist()
        [0.0, 0.6978]
    """
    kappa = torch.from_numpy(np.asarray(concentration, dtype=np.float64))
    ratio: Array = (torch.special.i1e(kappa) / torch.special.i0e(kappa)).numpy()
    return ratio
