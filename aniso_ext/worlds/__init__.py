"""Synthetic worlds: everything in the package can be run and judged without a download."""

from __future__ import annotations

from aniso_ext.worlds.gap import GapWorld, simulate_gap
from aniso_ext.worlds.planted import PlantedRows, PlantedWorld
from aniso_ext.worlds.shapes import ShapesWorld, build_world

__all__ = ["GapWorld", "PlantedRows", "PlantedWorld", "ShapesWorld", "build_world", "simulate_gap"]
