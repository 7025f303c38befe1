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
    for arm in (FLOOR, BOUND):
        if arm in ladder.scores:
            panel.axvline(ladder.mean(arm, name), color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
    for place, arm in enumerate(arms):
        values = ladder.scores[arm][name]
        colour = _ORANGE if arm.startswith("anisoalign") else _GREY if arm in ("blind", FLOOR, BOUND) else _BLUE
        panel.plot([min(values), max(values)], [place, place], color=colour, linewidth=2.5, alpha=0.5)
        panel.plot([ladder.mean(arm, name)], [place], "o", color=colour, markersize=6)
    panel.set_title(_TITLES.get(name, name.replace("_", " ")), fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _label(ladder: Ladder, arm: str) -> str:
    level = ladder.chosen.get(arm, arm)
    return arm if level == arm else f"{arm} (σ = {level.removeprefix(arm).lstrip('-')})"
