"""Scenes of one to four shapes: what there is to see, drawn at random and fully described by facts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("white", "grey", "brown", "black")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
MOST_ITEMS = 4

_COUNT_SHARES = (0.25, 0.25, 0.25, 0.25)
_REPEAT_SHARE = 0.4
"""How often a further item is of a kind that is already there."""
_TEXTURE_SHARES = (0.5, 0.25, 0.25)
_SALT_SCENE = 0


@dataclass(frozen=True)
class Kind:
    """What an item looks like; ``name`` tells the kinds of a scene apart, as no two share shape and colour."""

    shape: str
    colour: str
    size: str
    texture: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Item:
    """A kind at a place: ``row`` and ``column`` of a 3 × 3 grid, and a shift within the cell in [-1, 1]²."""

    kind: Kind
    row: int
    column: int
    shift: tuple[float, float]

    @property
    def place(self) -> str:
        """Such as "top left", "middle right" or "centre"."""
        if (self.row, self.column) == (1, 1):
            return "centre"
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Group:
    """The items of one kind."""

    kind: Kind
    items: tuple[Item, ...]

    @property
    def centre(self) -> tuple[float, float]:
        """Mean (row, column) of its cells."""
        rows, columns = zip(*((item.row, item.column) for item in self.items), strict=True)
        return float(np.mean(rows)), float(np.mean(columns))


@dataclass(frozen=True)
class Scene:
    """A picture in facts.

    ``key`` (world seed, stream, index) seeds everything that is said about the scene.
    """

    id: str
    key: tuple[int, int, int]
    background: str
    items: tuple[Item, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Items by kind, in order of first appearance."""
        kinds = dict.fromkeys(item.kind for item in self.items)
        return tuple(Group(kind, tuple(item for item in self.items if item.kind == kind)) for kind in kinds)

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this scene for one purpose, the same in every call."""
        return np.random.default_rng([*self.key, purpose])


def draw_scene(key: tuple[int, int, int], id: str, most_items: int = MOST_ITEMS) -> Scene:
    """The scene that ``key`` stands for."""
    random = np.random.default_rng([*key, _SALT_SCENE])
    shares = _COUNT_SHARES[:most_items]
    count = 1 + _weighted(random, tuple(share / sum(shares) for share in shares))
    kinds: list[Kind] = []
    while len(kinds) < count:
        if kinds and random.random() < _REPEAT_SHARE:
            kinds.append(kinds[int(random.integers(len(kinds)))])
            continue
        kind = _draw_kind(random)
        if kind.name not in {other.name for other in kinds}:
            kinds.append(kind)
    cells = random.choice(len(ROWS) * len(COLUMNS), size=count, replace=False)
    shifts = random.uniform(-1, 1, size=(count, 2))
    items = tuple(
        Item(kind, int(cell) // len(COLUMNS), int(cell) % len(COLUMNS), (float(shift[0]), float(shift[1])))
        for kind, cell, shift in zip(kinds, cells, shifts, strict=True)
    )
    return Scene(id, key, _one_of(random, BACKGROUNDS), items)


def _draw_kind(random: np.random.Generator) -> Kind:
    texture = TEXTURES[_weighted(random, _TEXTURE_SHARES)]
    return Kind(_one_of(random, SHAPES), _one_of(random, COLOURS), _one_of(random, SIZES), texture)


def _one_of(random: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(random.integers(len(values)))]


def _weighted(random: np.random.Generator, shares: tuple[float, ...]) -> int:
    return int(np.searchsorted(np.cumsum(shares), random.random(), side="right"))
