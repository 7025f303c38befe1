"""Options of methods as they are typed: which method takes which, and what a rank may look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from aniso_ext.align import Aligner


def parse_rank(text: str | None) -> int | float | None:
    """A rank as typed: an even number of directions (``128``), or the share of energy they must hold (``0.9``).

    Raises:
        typer.BadParameter: it is neither.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < 1:
        return value
    if not value.is_integer() or value < 2 or value % 2:
        raise typer.BadParameter(
            f"{text!r} is neither an even number of at least 2 nor an energy share like 0.9", param_hint="--rank"
        )
    return int(value)


def build_aligner(method: str, options: Mapping[str, Any]) -> Aligner:
    """An unfitted aligner with the options that were given (None: not given).

    Raises:
        typer.BadParameter: there is no such method, or it does not take one of the options.
    """
    from aniso_ext.align import list_aligners, make_aligner

    if method not in list_aligners():
        raise typer.BadParameter(
            f"there is no method {method!r}; choose one of {', '.join(list_aligners())}", param_hint="--method"
        )
    given = {name: value for name, value in options.items() if value is not None}
    accepted = make_aligner(method).get_params()
    for name in given:
        if name not in accepted:
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in accepted if name in options) or "none of them"
            raise typer.BadParameter(
                f"method {method} does not take it (of the method options it takes {takes})",
                param_hint=f"--{name.replace('_', '-')}",
            )
    return make_aligner(method, **given)
