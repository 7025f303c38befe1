"""The model: a causal language model that reads projected embeddings in place of an image token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from aniso_ext.errors import InputError
from aniso_ext.mllm.config import AnisoMLLMConfig
from aniso_ext.mllm.library import transformers
from aniso_ext.mllm.projector import Projector

if TYPE_CHECKING:
    from aniso_ext.mllm.correction import Correction

IMAGE_TOKEN = "<image>"


class AnisoMLLMForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Any causal language model with a projector of embeddings [n, D] to T tokens each (METHOD section 6).

    A correction, if one is set, maps source embeddings to stand-ins in training; in evaluation embeddings enter as they
    are. It is part of no saved model.

    Args:
        config: the language model is built from ``config.text_config`` with random weights; use
            :meth:`from_language_model` for one that is there and ``from_pretrained`` for a saved model.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> text = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                    num_attention_heads=2)
        >>> model = AnisoMLLMForCausalLM(AnisoMLLMConfig(text_config=text, embedding_width=8, image_token_id=49))
        >>> model(torch.tensor([[1, 49, 7]]), embeddings=torch.randn(1, 8)).logits.shape
        torch.Size([1, 3, 50])
    """

    config_class = AnisoMLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^correction\."]

    def __init__(self, config: AnisoMLLMConfig) -> None:
        super().__init__(config)
        self.language_model = transformers.AutoModelForCausalLM.from_config(config.text_config)
        self._no_split_modules = self.language_model._no_split_modules
        self.projector = _projector(config)
        self.correction: Correction | None = None
        self.post_init()

    @classmethod
    def from_language_model(
        cls,
        language_model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        embedding_width: int,
        visual_tokens: int = 1,
        projector_hidden: int | None = None,
        projector_gain: float | None = None,
        seed: int = 0,
    ) -> AnisoMLLMForCausalLM:
        """A new projector in front of a language model, which is taken over, not copied.

        ``<image>`` becomes a special token of the tokenizer; the language model gets a row for it if it has too few.

        Args:
            language_model, tokenizer: of each other.
            embedding_width, visual_tokens, projector_hidden: as in :class:`AnisoMLLMConfig`.
            projector_gain: its weights start with standard deviation gain / sqrt(inputs); None for the language model's
                ``initializer_range``, with which a narrow projector learns nothing in its first hundreds of steps.
            seed: of what is new. The global random state is left alone.

        Raises:
            InputError: a gain that is not positive.
        """
        if projector_gain is not None and not 0 < projector_gain < math.inf:
            raise InputError(f"projector_gain must be positive, or None, got {projector_gain!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls._around(language_model, tokenizer, embedding_width, visual_tokens, projector_hidden)
            model._start_projector(projector_gain)
        return model

    @classmethod
    def _around(
        cls, language_model: Any, tokenizer: Any, embedding_width: int, visual_tokens: int, projector_hidden: int | None
    ) -> AnisoMLLMForCausalLM:
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            added = {"additional_special_tokens": [IMAGE_TOKEN]}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
        if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = AnisoMLLMConfig(
            text_config=language_model.config,
            embedding_width=embedding_width,
            visual_tokens=visual_tokens,
            projector_hidden=projector_hidden,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        with torch.device("meta"):
            model = cls(config)
        model.language_model = language_model
        model.projector = _projector(config)
        model.generation_config = language_model.generation_config
        return model

    def _start_projector(self, gain: float | None) -> None:
        for layer in (self.projector.first, self.projector.last):
            own = getattr(self.config.text_config, "initializer_range", 0.02)
            nn.init.normal_(layer.weight, std=own if gain is None else gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        self.projector.to(self.language_model.device)

    def set_correction(self, correction: Correction | None) -> None:
        """Map source embeddings to stand-ins in training; None takes the correction off.

        Raises:
            InputError: the correction was fitted at another width.
        """
        wanted = self.config.embedding_width
        if correction is not None and correction.width not in (None, wanted):
            raise InputError(
                f"the aligner was fitted at width {correction.width}, but the projector takes {wanted}: use an aligner "
                "and embeddings of one encoder, or make the projector anew"
            )
        self.correction = correction

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits and, with labels, the loss of the next token.

        Args:
            input_ids: [B, S], with T image tokens for each embedding.
            attention_mask: [B, S] of ones for tokens and zeros for padding; None where rows are packed.
            labels: [B, S], -100 where there is no target.
            embeddings: [n, D], one for each image in the order of ``input_ids``, row after row.
            position_ids: [B, S]; with ``attention_mask=None`` a sample begins wherever they do not count on by one, and
                no token sees another sample.
            inputs_embeds: [B, S, H] in place of ``input_ids``.
            kwargs: of the language model.

        Returns:
            What the language model returns.

        Raises:
            InputError: embeddings of another width, or not one for each image.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._embed(input_ids, embeddings)
        if position_ids is not None and attention_mask is None and _cache(kwargs) is None:
            kwargs["use_cache"] = False  # with a cache transformers does not look for packed samples
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    def _embed(self, input_ids: torch.Tensor, embeddings: torch.Tensor | None) -> torch.Tensor:
        tokens = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        if embeddings is None:
            return tokens
        if embeddings.dim() != 2 or embeddings.shape[1] != self.config.embedding_width:
            raise InputError(
                f"embeddings have shape {list(embeddings.shape)}, but the projector takes "
                f"[n, {self.config.embedding_width}]: use embeddings of the encoder that the model was made for"
            )
        if self.correction is not None and self.training:
            embeddings = self.correction(embeddings)
        visual = self.projector(embeddings).to(tokens.dtype).flatten(0, 1)
        # counting waits for a GPU; in training the batches are ours, and were checked when they were made
        if not (self.training and places.is_cuda) and (count := int(places.sum())) != len(visual):
            raise InputError(
                f"{count} image tokens in input_ids, but {len(embeddings)} embeddings of {self.config.visual_tokens} "
                f"tokens each: write {IMAGE_TOKEN} once for each embedding and expand it with prompt_tokens"
            )
        return tokens.masked_scatter(places.unsqueeze(-1), visual)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, embeddings: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of a step; embeddings take their places when the prompt is read, and are in the cache then."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = _cache(kwargs)
        if kwargs.get("is_first_iteration") or cache is None or cache.get_seq_length() == 0:
            inputs["embeddings"] = embeddings
        return inputs

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``, with ``embeddings`` [B, D], one for each row.

        Raises:
            InputError: not one embedding for each row.
        """
        embeddings, input_ids = kwargs.get("embeddings"), kwargs.get("input_ids", inputs)
        if embeddings is not None and input_ids is not None and len(embeddings) != len(input_ids):
            raise InputError(
                f"{len(input_ids)} prompts but {len(embeddings)} embeddings: pass one embedding for each prompt"
            )
        return super().generate(inputs, *args, **kwargs)


def _cache(options: dict[str, Any]) -> Any:
    """The keys and values of what was read, under its new name in transformers or its old one."""
    return options.get("cache", options.get("past_key_values"))


def _projector(config: AnisoMLLMConfig) -> Projector:
    hidden = config.projector_hidden or config.text_config.hidden_size
    return Projector(
        config.embedding_width,
        hidden,
        config.text_config.hidden_size,
        visual_tokens=config.visual_tokens,
    )


transformers.AutoModelForCausalLM.register(AnisoMLLMConfig, AnisoMLLMForCausalLM, exist_ok=True)
