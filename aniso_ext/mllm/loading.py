"""A model and its tokenizer by name: saved ones, a language model with a new projector, or one made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.config import AnisoMLLMConfig
from aniso_ext.mllm.library import transformers
from aniso_ext.mllm.model import AnisoMLLMForCausalLM
from aniso_ext.mllm.small import FAMILIES, small_language_model, small_tokenizer


def load_model(
    name: str,
    *,
    embedding_width: int,
    visual_tokens: int = 1,
    projector_hidden: int | None = None,
    texts: Iterable[str] = (),
    vocab_size: int = 4096,
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[AnisoMLLMForCausalLM, transformers.PreTrainedTokenizerBase]:
    """A multimodal model, in float32, and its tokenizer.

    Args:
        name: folder of a multimodal model that was saved, which goes on; folder or hub id of a language model, which
            gets a new projector; or FAMILY:SIZE, e.g. ``llama:tiny``, for random weights and a tokenizer of its own.
        embedding_width, visual_tokens, projector_hidden: of a new projector.
        texts, vocab_size: what a tokenizer made on the spot learns from.
        chat_template: for a tokenizer that has none, or another than its own.
        seed: of what is random.

    Raises:
        DataError: nothing there that can be loaded.
        InputError: a saved multimodal model takes embeddings of another width.
    """
    family, _, size = name.partition(":")
    if family in FAMILIES and not Path(name).exists():
        tokenizer = small_tokenizer(texts, vocab_size)
        model = small_language_model(family, vocab_size=len(tokenizer), size=size or "tiny", seed=seed)
    else:
        model, tokenizer = _pretrained(name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if isinstance(model, AnisoMLLMForCausalLM):
        if model.config.embedding_width != embedding_width:
            raise InputError(
                f"{name} takes embeddings of width {model.config.embedding_width}, but they have {embedding_width}: "
                "use embeddings of the encoder that it was made for"
            )
        return model, tokenizer
    new = AnisoMLLMForCausalLM.from_language_model(
        model,
        tokenizer,
        embedding_width=embedding_width,
        visual_tokens=visual_tokens,
        projector_hidden=projector_hidden,
        seed=seed,
    )
    return new, tokenizer


def load_trained(folder: str | Path) -> tuple[AnisoMLLMForCausalLM, transformers.PreTrainedTokenizerBase]:
    """The model and the tokenizer that a training wrote.

    Raises:
        InputError: the folder holds none.
    """
    try:
        model = AnisoMLLMForCausalLM.from_pretrained(folder)
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "pass the folder of aniso train --output"
        raise InputError(f"{folder} holds no trained model ({reason}): {remedy}") from None


def _pretrained(name: str) -> tuple[Any, Any]:
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = AnisoMLLMForCausalLM if isinstance(config, AnisoMLLMConfig) else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(name, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        sizes = "llama:tiny, qwen2:30m and their like make one on the spot"
        raise DataError(f"{name} cannot be loaded ({reason}): pass a folder or a hub id; {sizes}") from None
