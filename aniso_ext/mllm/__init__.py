"""A multimodal language model on embeddings of a contrastive space, trained on stand-ins and text alone (METHOD 6).

Nothing here imports transformers until it is used; it is in the extra ``mllm``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "AnisoMLLMConfig": "aniso_ext.mllm.config",
    "AnisoMLLMForCausalLM": "aniso_ext.mllm.model",
    "Correction": "aniso_ext.mllm.correction",
    "TrainOptions": "aniso_ext.mllm.options",
    "TrainReport": "aniso_ext.mllm.training",
    "load_model": "aniso_ext.mllm.loading",
    "open_index": "aniso_ext.mllm.data",
    "prompt_tokens": "aniso_ext.mllm.templates",
    "small_language_model": "aniso_ext.mllm.small",
    "small_tokenizer": "aniso_ext.mllm.small",
    "train": "aniso_ext.mllm.training",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'aniso_ext.mllm' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
