"""An encoder without open_clip: fixed random products of pixels and of character counts. Run as a program, it dies.

    python toy_encoder.py IMAGES OUTPUT WHERE NUMBER

embeds as the tests do and ends without clean-up at the NUMBER-th ``shard`` (files in place, no line yet), ``line``
(just written) or ``batch``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aniso_ext.data import EncoderRecord
from aniso_ext.encode import Encoder, embed_files

WIDTH, SIDE, CONTEXT = 16, 8, 32
OPTIONS: dict[str, Any] = {"batch_rows": 3, "rows_per_shard": 7, "workers": 0, "dtype": "float32"}
DEATH = 9


def transform(image: Any) -> torch.Tensor:
    pixels = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def tokenizer(texts: Sequence[str]) -> torch.Tensor:
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in enumerate(texts):
        for byte in text.encode("utf-8", "surrogatepass"):
            tokens[row, byte % CONTEXT] += 1
    return tokens


class Towers:
    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.image = torch.randn(3 * SIDE * SIDE, WIDTH, generator=generator)
        self.text = torch.randn(CONTEXT, WIDTH, generator=generator)

    def eval(self) -> Towers:
        return self

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.image

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float() @ self.text


def toy_encoder(seed: int = 0) -> Encoder:
    record = EncoderRecord(f"toy {seed}", "toy", None, None, WIDTH, True, (SIDE, SIDE), "none")
    return Encoder(Towers(seed), transform, tokenizer, record)


def die_at(where: str, number: int) -> None:
    from aniso_ext.encode.manifest import Manifest

    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(DEATH)

    if where == "batch":
        encode = Towers.encode_image

        def encode_image(self: Towers, images: torch.Tensor) -> torch.Tensor:
            count()
            return encode(self, images)

        Towers.encode_image = encode_image  # type: ignore[method-assign]
        return
    add = Manifest.add

    def add_line(self: Manifest, line: Any) -> None:
        if where == "shard":
            count()
        add(self, line)
        if where == "line":
            count()

    Manifest.add = add_line  # type: ignore[method-assign]


if __name__ == "__main__":
    images, output, where, number = sys.argv[1:]
    die_at(where, int(number))
    embed_files(toy_encoder(), Path(output), images=images, **OPTIONS)
