"""The configuration of a multimodal language model: a language model, and how embeddings enter it."""

from __future__ import annotations

from typing import Any, ClassVar

from aniso_ext.errors import InputError
from aniso_ext.mllm.library import transformers


class AnisoMLLMConfig(transformers.PreTrainedConfig):
    """A language model's configuration with that of the projector.

    Args:
        text_config: configuration of the language model, or its dictionary with ``model_type``; Llama's by default.
        embedding_width: D of the embeddings.
        visual_tokens: T, how many tokens an embedding becomes.
        projector_hidden: width of the projector's hidden layer; None for the width of the language model.
        image_token_id: the token whose places the projected embeddings take.
        aligner_fingerprint: of the aligner whose stand-ins the model was trained on; None if there was none.

    Raises:
        InputError: a width or a number of tokens below 1.
    """

    model_type: ClassVar[str] = "aniso_mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": transformers.AutoConfig}

    text_config: Any = None
    embedding_width: int = 512
    visual_tokens: int = 1
    projector_hidden: int | None = None
    image_token_id: int = 0
    aligner_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "llama")
            self.text_config = transformers.CONFIG_MAPPING[model_type](**{**self.text_config, "model_type": model_type})
        elif self.text_config is None:
            self.text_config = transformers.CONFIG_MAPPING["llama"]()
        self.projector_hidden = self.projector_hidden or self.text_config.hidden_size
        for name in ("embedding_width", "visual_tokens", "projector_hidden"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)


transformers.AutoConfig.register(AnisoMLLMConfig.model_type, AnisoMLLMConfig, exist_ok=True)
