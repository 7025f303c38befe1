"""Scenes as pixels, with NumPy alone: smooth edges by supersampling, each stencil computed once."""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np

from aniso_ext.worlds.shapes.scenes import Item, Scene

SIZE = 64
Array: TypeAlias = np.ndarray

_RGB = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 222, 50),
    "green": (44, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 70, 205),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
    "white": (240, 240, 240),
    "grey": (140, 140, 140),
    "brown": (110, 75, 50),
    "black": (25, 25, 25),
}
_RADII = {"small": 5.0, "large": 9.0}
_ROOM = {"small": 4.0, "large": 1.0}
"""How far an item may stray from the middle of its cell, in 1/64 of the picture."""
_SAMPLES = 4
_SHADE = 0.35
_SALT_LIGHT = 1


def render(scene: Scene, size: int = SIZE) -> Array:
    """The picture of a scene, [size, size, 3] uint8; a function of the scene alone.

    Each picture has a light of its own: a weak gradient over the background and a brightness for each item.
    """
    random = scene.generator(_SALT_LIGHT)
    slope = random.uniform(-0.12, 0.12, size=2)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + slope[0] * axis[:, None] + slope[1] * axis[None, :]
    canvas = light[:, :, None].astype(np.float32) * np.array(_RGB[scene.background], np.float32)
    for item, brightness in zip(scene.items, random.uniform(0.85, 1.1, size=len(scene.items)), strict=True):
        _paint(canvas, item, float(brightness), size)
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def _paint(canvas: Array, item: Item, brightness: float, size: int) -> None:
    kind, unit = item.kind, size / SIZE
    cover, shade = _stencil(kind.shape, kind.texture, max(2, round(_RADII[kind.size] * unit)), unit)
    cell, room = size / 3, _ROOM[kind.size] * unit
    top = round((item.row + 0.5) * cell + item.shift[0] * room - len(cover) / 2)
    left = round((item.column + 0.5) * cell + item.shift[1] * room - len(cover) / 2)
    box = canvas[top : top + len(cover), left : left + len(cover)]
    box += cover * (shade * (brightness * np.array(_RGB[kind.colour], np.float32)) - box)


@cache
def _stencil(shape: str, texture: str, radius: int, unit: float) -> tuple[Array, Array]:
    """How much of each pixel a shape covers, and how bright its texture is there; both [2 radius, 2 radius, 1]."""
    side = 2 * radius
    points = (np.arange(side * _SAMPLES, dtype=np.float32) + 0.5) / (radius * _SAMPLES) - 1
    y, x = np.meshgrid(points, points, indexing="ij")
    inside = _inside(shape, x, y)
    pixel_y, pixel_x = y * radius / unit, x * radius / unit
    match texture:
        case "striped":
            dark = np.mod(pixel_y, 4) < 2
        case "dotted":
            dark = (np.mod(pixel_x, 4) - 2) ** 2 + (np.mod(pixel_y, 4) - 2) ** 2 < 1.9
        case _:
            dark = np.zeros_like(inside)
    cover, shade = _pixels(inside), 1 - (1 - _SHADE) * _pixels(dark)
    return cover[:, :, None], shade[:, :, None]


def _inside(shape: str, x: Array, y: Array) -> Array:
    square, round_ = np.maximum(abs(x), abs(y)), x**2 + y**2
    match shape:
        case "circle":
            return round_ <= 1
        case "square":
            return square <= 0.86
        case "triangle":
            return (abs(y) <= 0.9) & (abs(x) <= (y + 0.9) / 1.8)
        case "diamond":
            return abs(x) + abs(y) <= 1
        case "cross":
            return (square <= 0.95) & (np.minimum(abs(x), abs(y)) <= 0.32)
        case _:
            return (round_ <= 1) & (round_ >= 0.3)


def _pixels(samples: Array) -> Array:
    side = len(samples) // _SAMPLES
    return samples.reshape(side, _SAMPLES, side, _SAMPLES).mean(axis=(1, 3), dtype=np.float32)
