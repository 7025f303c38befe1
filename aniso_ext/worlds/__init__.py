"""Synthetic worlds: everything in the package can be run and judged without a download."""

from __future__ import annotations

from aniso_ext.worlds.gap import GapWorld, simulate_gap
from aniso_ext.worlds.planted import PlantedRows, PlantedWorld

__all__ = ["GapWorld", "PlantedRows", "PlantedWorld", "simulate_gap"]
