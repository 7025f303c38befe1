"""Rendered scenes of coloured shapes, with captions and questions from a grammar and a small dual encoder."""

from __future__ import annotations

from aniso_ext.worlds.shapes.dual_encoder import DualEncoder, DualEncoderOptions
from aniso_ext.worlds.shapes.files import build_world
from aniso_ext.worlds.shapes.scenes import Scene
from aniso_ext.worlds.shapes.world import ShapesWorld

__all__ = ["DualEncoder", "DualEncoderOptions", "Scene", "ShapesWorld", "build_world"]
