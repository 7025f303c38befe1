"""The ladder as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aniso_ext.mllm.arms.table import BOUND, FLOOR, Ladder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_TITLES = {"cider_d": "CIDEr-D of captions", "attribute": "attributes right", "yes_no": "yes or no right"}


def ladder_figure(ladder: Ladder, names: tuple[str, ...] | None = None) -> Figure:
    """One panel for each score: a dot for the mean of each arm, a line over its seeds, rules at identity and the bound.

    The axis begins where the arms other than ``blind`` do; an arm below it is an arrow with its number.

    Args:
        ladder: results.
        names: scores to show; by default captions, attributes, multiple choice and yes or no, those that there are.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    wanted = names or ("cider_d", "attribute", "multiple_choice", "yes_no")
    shown = [name for name in wanted if name in ladder.names]
    arms = list(ladder.scores)
    figure = Figure(figsize=(3.2 * len(shown) + 1.4, 0.32 * len(arms) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, shown, strict=True):
        _panel(panel, ladder, arms, name)
    panels[0].set_yticks(range(len(arms)), [_label(ladder, arm) for arm in arms])
    panels[0].invert_yaxis()
    return figure


def _panel(panel: Any, ladder: Ladder, arms: list[str], name: str) -> None:
    low, high = _limits(ladder, arms, name)
    for arm in (FLOOR, BOUND):
        if arm in ladder.scores:
            panel.axvline(ladder.mean(arm, name), color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
    for place, arm in enumerate(arms):
        values, mean = ladder.scores[arm][name], ladder.mean(arm, name)
        colour = _ORANGE if arm.startswith("anisoalign") else _GREY if arm in ("blind", FLOOR, BOUND) else _BLUE
        if mean < low:
            panel.plot([low], [place], "<", color=colour, markersize=6, clip_on=False)
            panel.annotate(f"{mean:.2f}", (low, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        panel.plot([min(values), max(values)], [place, place], color=colour, linewidth=2.5, alpha=0.5)
        panel.plot([mean], [place], "o", color=colour, markersize=6)
    panel.set_xlim(low, high)
    panel.set_title(_TITLES.get(name, name.replace("_", " ")), fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _limits(ladder: Ladder, arms: list[str], name: str) -> tuple[float, float]:
    """Of the axis: all arms but the blind one, which would leave no room for the differences of the others."""
    shown = [value for arm in arms if arm != "blind" or len(arms) == 1 for value in ladder.scores[arm][name]]
    margin = 0.08 * (max(shown) - min(shown)) or 0.05
    return min(shown) - margin, max(shown) + margin


def _label(ladder: Ladder, arm: str) -> str:
    level = ladder.chosen.get(arm, arm)
    return arm if level == arm else f"{arm} (σ = {level.removeprefix(arm).lstrip('-')})"
