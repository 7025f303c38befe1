"""Aligners by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.align.base import Aligner

AlignerClass = TypeVar("AlignerClass", bound="type[Aligner]")
_ALIGNERS: dict[str, type[Aligner]] = {}


def register(name: str) -> Callable[[AlignerClass], AlignerClass]:
    """Class decorator: make an :class:`Aligner` known by ``name`` to :func:`make_aligner` and to saved artefacts.

    Raises:
        InputError: another class has the name already.

    Example:
        >>> from aniso_ext.align import Aligner, register
        >>> @register("as_is")
        ... class AsIs(Aligner):
        ...     def _fit(self, source, target):
        ...         return {}, {}
        ...     def _apply(self, rows):
        ...         return rows
    """

    def decorate(aligner: AlignerClass) -> AlignerClass:
        known = _ALIGNERS.get(name)
        if known is not None and known.__qualname__ != aligner.__qualname__:
            raise InputError(f"the aligner name {name!r} belongs to {known.__qualname__}: choose another")
        aligner.method = name
        _ALIGNERS[name] = aligner
        return aligner

    return decorate


def aligner_class(name: str) -> type[Aligner]:
    """The class behind a name."""
    if name not in _ALIGNERS:
        raise InputError(f"unknown aligner {name!r}: choose one of {', '.join(list_aligners())}")
    return _ALIGNERS[name]


def list_aligners() -> list[str]:
    """Names of all aligners, the baselines first.

    Example:
        >>> import aniso_ext as aniso
        >>> "realign" in aniso.list_aligners()
        True
    """
    return sorted(_ALIGNERS, key=lambda name: not _ALIGNERS[name].baseline)


def make_aligner(name: str, **options: Any) -> Aligner:
    """An unfitted aligner by name (METHOD section 5).

    Args:
        name: one of :func:`list_aligners`.
        options: keyword options of that aligner.

    Raises:
        InputError: the name or an option is unknown.

    Example:
        >>> import aniso_ext as aniso
        >>> aniso.make_aligner("c3_paper", noise_std=0.05)
        C3Paper(noise_std=0.05)
    """
    aligner = aligner_class(name)
    known = aligner.parameter_names()
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"{name} has no option {', '.join(unknown)}: it takes {', '.join(known) or 'none'}")
    return aligner(**options)
