"""A small world for the multimodal tests: twelve kinds of things, a caption and an embedding each, a model for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from aniso_ext.mllm import AnisoMLLMForCausalLM, TrainOptions, small_language_model, small_tokenizer

COLOURS, SHAPES = ("red", "blue", "green", "black"), ("circle", "square", "star")
QUICK = TrainOptions(
    global_batch=16, device_batch=8, projector_learning_rate=0.02, learning_rate=0.003, max_length=64, device="cpu"
)


@dataclass(frozen=True)
class World:
    """Captions, unit rows of their kinds with some scatter, and what belongs to them."""

    rows: int = 48
    width: int = 16
    tokenizer: PreTrainedTokenizerFast = field(init=False)
    captions: list[dict[str, Any]] = field(init=False)
    embeddings: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        names = [f"a {COLOURS[i % 4]} {SHAPES[i % 3]}" for i in range(self.rows)]
        random = np.random.default_rng(0)
        kinds = random.standard_normal((12, self.width))
        rows = kinds[np.arange(self.rows) % 12] + 0.1 * random.standard_normal((self.rows, self.width))
        unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        object.__setattr__(self, "tokenizer", small_tokenizer([*names, "Describe the image."], 300))
        object.__setattr__(self, "captions", [{"id": f"s{i}", "caption": name} for i, name in enumerate(names)])
        object.__setattr__(self, "embeddings", unit)

    @property
    def ids(self) -> list[str]:
        return [record["id"] for record in self.captions]

    def model(self, family: str = "llama", *, visual_tokens: int = 1, **options: Any) -> AnisoMLLMForCausalLM:
        language_model = small_language_model(family, vocab_size=len(self.tokenizer), **options)
        return AnisoMLLMForCausalLM.from_language_model(
            language_model, self.tokenizer, embedding_width=self.width, visual_tokens=visual_tokens
        )


def weights(model_or_folder: Any) -> dict[str, torch.Tensor]:
    """All weights by name, of a model or of a saved one."""
    if isinstance(model_or_folder, (str, Path)):
        from safetensors.torch import load_file

        return load_file(Path(model_or_folder) / "model.safetensors")
    return {name: value.detach().clone() for name, value in model_or_folder.named_parameters()}
