"""The arms of a comparison, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from aniso_ext.errors import InputError


@dataclass(frozen=True)
class Arm:
    """What a model is trained on.

    Attributes:
        name: in tables and on the command line.
        rows: ``source`` embeddings, ``target`` ones (the bound), or ``nothing``: one and the same row for all.
        method: aligner that makes stand-ins of the source, by name; None for none.
        options: of the aligner.
        noise_std: Gaussian noise in each coordinate, renormalised.
        noise_shape: ``isotropic``, or ``residual``: noise of the same energy in the shape of the unpaired residual of
            the stand-ins, :func:`aniso_ext.align.residual.unpaired_residual`.
        neighbours: so many target rows of other things, near each stand-in, take its place by their mean.
        train_refiner: the language model's loss tunes the refiner.
        tuned: name under which the best of several arms, by their validation scores, is reported.
    """

    name: str
    rows: str = "source"
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    noise_std: float = 0.0
    noise_shape: str = "isotropic"
    neighbours: int = 0
    train_refiner: bool = False
    tuned: str | None = None

    @property
    def aligner(self) -> str | None:
        """Key of the fitted aligner; arms with the same one share it."""
        if self.method is None:
            return None
        return "-".join([self.method, *(f"{name}={value}" for name, value in sorted(self.options.items()))])


_NOISE = (0.01, 0.02, 0.04, 0.06, 0.08)
"""In 512 dimensions these have lengths from 0.2 to 1.8, around the residual of real encoders."""
_METHOD_NOISE = (0.02, 0.04, 0.06)
"""Levels on stand-ins of a method, beside none: what is left to blur is less than that of the source itself."""
_RESIDUAL_NOISE = (0.01, 0.02, 0.03, 0.04)
"""The residual of fashion44k itself has .028 in each coordinate."""
_NEAR, _NEIGHBOURS = "-neighbours", 5

ARMS = {
    arm.name: arm
    for arm in (
        Arm("blind", rows="nothing"),
        Arm("identity"),
        *(Arm(f"noise-{sigma}", noise_std=sigma, tuned="noise") for sigma in _NOISE),
        Arm("mean_shift", method="mean_shift"),
        Arm("c3_code", method="c3_code"),
        Arm("c3_paper", method="c3_paper"),
        Arm("realign", method="realign"),
        Arm("initialisation", method="anisoalign", options={"refine": False}),
        Arm("anisoalign", method="anisoalign"),
        Arm("anisoalign-tuned", method="anisoalign", train_refiner=True),
        Arm("images", rows="target"),
    )
}
"""By name, from the floor to the bound."""


def choose_arms(names: Iterable[str] | None, *, noise: str | None = None, neighbours: int = 0) -> list[Arm]:
    """Arms by name, in the order of :data:`ARMS`; ``noise`` is all of its levels. None is every arm.

    Args:
        names: of arms, or ``all`` among them; with ``-neighbours`` behind it, the arm has the mean of five target rows
            near each stand-in in its place.
        noise: ``each`` gives every method without pairs its levels of noise, of which the validation scores choose one;
            ``residual`` gives it levels in the shape of its unpaired residual, where it has no noise of its own.
        neighbours: above 0, so many target rows near each stand-in take the place of those of identity and of every
            method whose refiner is not trained along; identity itself stays beside them.

    Raises:
        InputError: an unknown name, neighbours below 0, or residual noise beside them.

    Example:
        >>> [arm.name for arm in choose_arms(["realign"], noise="each")]
        ['realign', 'realign-0.02', 'realign-0.04', 'realign-0.06']
    """
    if noise not in (None, "each", "residual"):
        raise InputError(f"noise must be 'each', 'residual' or None, got {noise!r}")
    if neighbours < 0 or (neighbours and noise == "residual"):
        raise InputError(
            f"neighbours must be 0 or more, and take the residual's place: got {neighbours} with noise={noise!r}"
        )
    known = {*ARMS, *(arm.tuned for arm in ARMS.values() if arm.tuned)}
    known |= {f"{arm.name}{_NEAR}" for arm in ARMS.values() if _may_have_neighbours(arm)}
    wanted = {"all"} if names is None else set(names)
    if unknown := sorted(wanted - known - {"all"}):
        raise InputError(f"unknown arm {unknown[0]!r}: choose of all, {', '.join(sorted(known))}")
    chosen = []
    for arm in ARMS.values():
        plain, near = {"all", arm.name, arm.tuned} & wanted, f"{arm.name}{_NEAR}" in wanted
        replaced = plain and neighbours and _may_have_neighbours(arm)
        if plain and (arm.method is None or not replaced):
            chosen.append(arm)
        if near or replaced:
            chosen.append(replace(arm, name=f"{arm.name}{_NEAR}", neighbours=neighbours or _NEIGHBOURS))
    levels = {None: lambda arm: [arm], "each": _levels, "residual": _residual_levels}[noise]
    return [level for arm in chosen for level in levels(arm)]


def _may_have_neighbours(arm: Arm) -> bool:
    """Stand-ins of a source that have no noise of their own, and no refiner that waits for a gradient."""
    return arm.rows == "source" and not arm.noise_std and not arm.train_refiner and _own_noise(arm) is None


def _levels(arm: Arm) -> list[Arm]:
    """An arm with a method as it is, and with more noise; where the method has noise of its own, with other values."""
    if arm.method is None and not arm.neighbours:
        return [arm]
    own = _own_noise(arm)
    found = [replace(arm, tuned=arm.name)]
    for sigma in _METHOD_NOISE:
        name = f"{arm.name}-{sigma}"
        if own is None:
            found.append(replace(arm, name=name, tuned=arm.name, noise_std=sigma))
        elif sigma != own:
            found.append(replace(arm, name=name, tuned=arm.name, options={**arm.options, "noise_std": sigma}))
    return found


def _residual_levels(arm: Arm) -> list[Arm]:
    """An arm with a method and no noise of its own at levels of residual noise, reported as one; others as they are."""
    if arm.method is None or arm.neighbours or _own_noise(arm) is not None:
        return [arm]
    group = f"{arm.name}-residual"
    return [
        replace(arm, name=f"{group}-{sigma}", tuned=group, noise_std=sigma, noise_shape="residual")
        for sigma in _RESIDUAL_NOISE
    ]


def _own_noise(arm: Arm) -> float | None:
    """Standard deviation of the noise that is part of the method, such as that of C3; None where there is none."""
    from aniso_ext.align import make_aligner

    return None if arm.method is None else make_aligner(arm.method).get_params().get("noise_std")
