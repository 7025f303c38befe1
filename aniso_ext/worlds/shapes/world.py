"""The world of shapes: scenes by the number, their pictures, what is said of them, and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.errors import InputError
from aniso_ext.worlds.shapes import grammar, rendering
from aniso_ext.worlds.shapes import questions as asking
from aniso_ext.worlds.shapes.scenes import MOST_ITEMS, Scene, draw_scene

if TYPE_CHECKING:
    from aniso_ext.worlds.shapes.dual_encoder import DualEncoder, DualEncoderOptions

SPLITS = ("encoder", "train_text", "train_image", "test")


@dataclass(frozen=True)
class ShapesWorld:
    """Scenes of coloured shapes with pictures, captions, questions and answers; everything is a function of the seed.

    Scene i of a split depends on the seed, the split and i alone. Splits are independent draws.

    Args:
        seed: of everything.
        size: of a picture, in pixels.
        most_items: of a scene; its count is uniform from one.

    Example:
        >>> world = ShapesWorld(seed=0)
        >>> (scene,) = world.scenes(1, split="test")
        >>> world.render(scene).shape
        (64, 64, 3)
    """

    seed: int = 0
    size: int = rendering.SIZE
    most_items: int = MOST_ITEMS

    def __post_init__(self) -> None:
        if self.seed < 0 or self.size < 32:
            raise InputError(f"seed must be at least 0 and size at least 32, got {self.seed} and {self.size}")
        if not 1 <= self.most_items <= MOST_ITEMS:
            raise InputError(f"most_items must be in 1 to {MOST_ITEMS}, got {self.most_items}")

    def scenes(self, count: int, *, split: str = "train_text", start: int = 0) -> list[Scene]:
        """Scenes ``start`` … ``start + count - 1`` of one of the ``SPLITS``."""
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        stream = SPLITS.index(split)
        return [
            draw_scene((self.seed, stream, number), f"{split}_{number:06d}", self.most_items)
            for number in range(start, start + count)
        ]

    def render(self, scene: Scene) -> np.ndarray:
        """The picture, [size, size, 3] uint8."""
        return rendering.render(scene, self.size)

    def captions(self, scene: Scene, count: int = 1) -> list[str]:
        """Different true captions, at most ``count``; the first one is *the* caption of the scene."""
        return grammar.captions(scene, count)

    def questions(
        self,
        scene: Scene,
        *,
        kinds: Sequence[str] = asking.KINDS,
        each: int = 1,
        attributes: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Questions with answers, as evaluation reads them; see :func:`aniso_ext.worlds.shapes.questions.questions`."""
        return asking.questions(scene, kinds=kinds, each=each, attributes=attributes)

    def train_dual_encoder(
        self, *, options: DualEncoderOptions | None = None, progress: Callable[[int, int], None] | None = None
    ) -> DualEncoder:
        """An encoder of this world; see :func:`aniso_ext.worlds.shapes.dual_encoder.train_dual_encoder`."""
        from aniso_ext.worlds.shapes.dual_encoder import train_dual_encoder

        return train_dual_encoder(self, options=options, progress=progress)

    def embed(self, encoder: DualEncoder, scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows of captions and of pictures, both [N, D]; row i of both is scene i."""
        return self.embed_texts(encoder, scenes), self.embed_images(encoder, scenes)

    def embed_texts(self, encoder: DualEncoder, scenes: Sequence[Scene]) -> np.ndarray:
        """Unit rows of the captions, [N, D]."""
        return encoder.embed_texts([self.captions(scene)[0] for scene in scenes])

    def embed_images(self, encoder: DualEncoder, scenes: Sequence[Scene]) -> np.ndarray:
        """Unit rows of the pictures, [N, D]."""
        return encoder.embed_images(np.stack([self.render(scene) for scene in scenes]))
