"""What can be said about a scene: noun phrases, places, relations, and captions made of them."""

from __future__ import annotations

from collections.abc import Callable

from aniso_ext.worlds.shapes.scenes import Group, Kind, Scene

NUMBERS = ("no", "one", "two", "three", "four")
_SALT_CAPTION = 2
_ROUNDS = 3
"""Times that each template gets a chance with another order of the groups."""
_APART, _ABREAST = 0.75, 0.5
"""Cells between two centres: at least so far along one axis and at most so far along the other is a clear direction."""


def noun_phrase(kind: Kind, count: int = 1) -> str:
    """Such as "a large striped red circle" or "two small blue squares"."""
    texture = "" if kind.texture == "plain" else f"{kind.texture} "
    return counted(f"{kind.size} {texture}{kind.name}", count)


def counted(noun: str, count: int) -> str:
    """ "a cross", "an orange ring", "three crosses"."""
    if count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{NUMBERS[count]} {plural(noun)}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def relation(first: Group, second: Group) -> str | None:
    """Where the first group is, seen from the second: "above", "below", "left of", "right of"; None if on a slant."""
    down, right = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(down) >= _APART and abs(right) <= _ABREAST:
        return "above" if down < 0 else "below"
    if abs(right) >= _APART and abs(down) <= _ABREAST:
        return "left of" if right < 0 else "right of"
    return None


def captions(scene: Scene, count: int = 1) -> list[str]:
    """Different true captions of a scene, at most ``count``, in an order of the scene's own."""
    random = scene.generator(_SALT_CAPTION)
    groups = scene.groups
    found: dict[str, None] = {}
    for _ in range(_ROUNDS):
        for template in random.permutation(len(_TEMPLATES)).tolist():
            ordered = [groups[index] for index in random.permutation(len(groups)).tolist()]
            text = _TEMPLATES[template](ordered, scene.background)
            if text is not None:
                found[text] = None
            if len(found) == count:
                return list(found)
    return list(found)


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _phrases(groups: list[Group]) -> str:
    return _listed([noun_phrase(group.kind, len(group.items)) for group in groups])


def _placed(group: Group) -> str:
    phrase = noun_phrase(group.kind, len(group.items))
    if len(group.items) > 1:
        return phrase
    place = group.items[0].place
    return f"{phrase} {'in' if place == 'centre' else 'at'} the {place}"


def _on_background(groups: list[Group], background: str) -> str | None:
    return f"{_phrases(groups)} on a {background} background"


def _picture_of(groups: list[Group], background: str) -> str | None:
    return f"a picture of {_phrases(groups)} against {background}"


def _there_are(groups: list[Group], background: str) -> str | None:
    verb = "is" if len(groups[0].items) == 1 else "are"
    return f"there {verb} {_phrases(groups)} on {background}"


def _with_places(groups: list[Group], background: str) -> str | None:
    return f"{_listed([_placed(group) for group in groups])} on a {background} background"


def _counted_first(groups: list[Group], background: str) -> str | None:
    total = sum(len(group.items) for group in groups)
    if total == 1:
        return None
    return f"{NUMBERS[total]} shapes on {background}: {_phrases(groups)}"


def _related(groups: list[Group], background: str) -> str | None:
    if len(groups) != 2 or (where := relation(*groups)) is None:
        return None
    first, second = (noun_phrase(group.kind, len(group.items)) for group in groups)
    return f"{first} {where} {second} on a {background} background"


_TEMPLATES: tuple[Callable[[list[Group], str], str | None], ...] = (
    _on_background,
    _picture_of,
    _there_are,
    _with_places,
    _counted_first,
    _related,
)
