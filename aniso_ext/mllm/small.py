"""Tokenizers and language models that are made on the spot: for offline worlds, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Roles in marks of their own; what the assistant says is marked for training, its end included."""

_SPECIAL = ("<|pad|>", "<|end|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")
FAMILIES = ("llama", "qwen2")
_SHAPES = {
    "tiny": (64, 2, 4, 176),
    "10m": (256, 8, 8, 704),
    "30m": (512, 8, 8, 1408),
    "60m": (640, 10, 10, 1728),
    "1b": (2048, 16, 16, 8192),
}
"""Width, layers, heads and inner width."""


def small_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template and ``<image>`` as one token.

    Args:
        texts: what merges are learned from.
        vocab_size: at most, the 256 bytes and the special tokens included.

    Example:
        >>> tokenizer = small_tokenizer(["a red circle", "a blue square"], 300)
        >>> tokenizer.decode(tokenizer("a red circle").input_ids)
        'a red circle'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from aniso_ext.mllm.library import transformers

    if vocab_size < 256 + len(_SPECIAL):
        raise InputError(f"vocab_size must be at least {256 + len(_SPECIAL)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(_SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def small_language_model(
    family: str = "llama", *, vocab_size: int, size: str = "tiny", seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A language model of random weights.

    Args:
        family: ``llama`` or ``qwen2``.
        vocab_size: of the tokenizer.
        size: ``tiny``, ``10m``, ``30m``, ``60m`` or ``1b``: about that many parameters beside the vocabulary.
        seed: of the weights. The global random state is left alone.
        options: of the configuration, e.g. ``tie_word_embeddings=True`` or ``num_hidden_layers=4``.

    Example:
        >>> small_language_model("qwen2", vocab_size=300).config.hidden_size
        64
    """
    import torch

    from aniso_ext.mllm.library import transformers

    if family not in FAMILIES:
        raise InputError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if size not in _SHAPES:
        raise InputError(f"size must be one of {', '.join(_SHAPES)}, got {size!r}")
    width, layers, heads, inner = _SHAPES[size]
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        # those of small_tokenizer: <|pad|> and <|end|>
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = transformers.AutoConfig.for_model(family, vocab_size=vocab_size, **{**shape, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config)
