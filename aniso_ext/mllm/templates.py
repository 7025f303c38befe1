"""Chat templates: the tokens of a conversation, and which of them the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.mllm.library import transformers

Messages = Sequence[Mapping[str, str]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation under the tokenizer's chat template, and which of them are targets.

    A template with ``{% generation %}`` marks them itself. For any other, they are what a longer rendering adds to a
    shorter one: from the prompt of a turn of the assistant to the end of that turn, up to and with the last special or
    added token that follows its content, where there is one.

    Args:
        tokenizer: a fast one, with a chat template.
        messages: [{"role": "user" or "assistant" or "system", "content": str}, ...].

    Returns:
        Token ids and, for each, whether the assistant says it.

    Raises:
        InputError: there is no template, it refuses the conversation, or its renderings do not continue each other.

    Example:
        >>> from aniso_ext.mllm import small_tokenizer
        >>> tokenizer = small_tokenizer(["a red circle"], 300)
        >>> turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a red circle"}]
        >>> tokens, targets = encode_conversation(tokenizer, turns)
        >>> tokenizer.decode([token for token, target in zip(tokens, targets) if target])
        'a red circle<|end|>'
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} gives no positions in the text: use its fast version")
    if _GENERATION.search(_template(tokenizer)):
        tokens, targets = _marked(tokenizer, messages)
    else:
        tokens, targets = _by_prefixes(tokenizer, messages)
    if not any(targets):
        raise InputError("the chat template leaves nothing that the assistant says: every target is masked")
    return tokens, targets


def prompt_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    image_token_id: int,
    visual_tokens: int = 1,
) -> list[int]:
    """Tokens of a prompt, up to where the assistant begins to speak, with T image tokens for ``<image>``.

    Args:
        tokenizer: with a chat template.
        prompt: what the user says, or a conversation that ends with the user.
        image_token_id, visual_tokens: of the model's configuration.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = _render(tokenizer, messages, prompt=True)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return expand_images(tokens, image_token_id, visual_tokens)


def expand_images(
    tokens: Sequence[Any], image_token_id: int, visual_tokens: int, like: Sequence[Any] = ()
) -> list[Any]:
    """``tokens`` with each image token T times; or ``like``, repeated where ``tokens`` has an image."""
    values = like or tokens
    return [
        value
        for token, value in zip(tokens, values, strict=True)
        for _ in range(visual_tokens if token == image_token_id else 1)
    ]


def _template(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        reason = "the tokenizer has no chat template: set tokenizer.chat_template, or pass --chat-template FILE"
        raise InputError(reason) from None


def _render(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    return str(_apply(tokenizer, messages, tokenize=False, add_generation_prompt=prompt))


def _apply(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, **options: Any) -> Any:
    from jinja2 import TemplateError

    _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError as error:
        raise InputError(f"the chat template refuses the conversation ({error}): reorder its turns") from None


def _marked(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    tokens, targets = list(encoded["input_ids"]), [bool(value) for value in encoded["assistant_masks"]]
    if all(message["content"].isascii() for message in messages):
        return tokens, targets
    # of a character of several tokens transformers marks the first one as the end
    text = _render(tokenizer, messages)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for place in range(1, len(tokens)):
        targets[place] = targets[place] or (targets[place - 1] and offsets[place] == offsets[place - 1])
    return tokens, targets


def _by_prefixes(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    text = _render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(encoded.input_ids), encoded.offset_mapping
    # an end token need not be registered as special
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    targets = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, said, end = _span(tokenizer, messages, number, text)
        inside = [place for place, (first, last) in enumerate(offsets) if start <= first < last <= end]
        ends = [place for place in inside if offsets[place][0] >= said and tokens[place] in marks]
        for place in inside:
            targets[place] = not ends or place <= ends[-1]
    return tokens, targets


def _span(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, number: int, text: str
) -> tuple[int, int, int]:
    """Where in ``text`` what turn ``number`` adds to the prompt before it starts, its content ends, and it ends."""
    before = _render(tokenizer, messages[:number], prompt=True)
    after = _render(tokenizer, messages[: number + 1])
    if not after.startswith(before) or not text.startswith(after):
        raise InputError(
            f"the chat template renders turn {number + 1} differently once the conversation goes on, so what the "
            "assistant says cannot be told apart: mark it in the template with {% generation %}"
        )
    content = messages[number]["content"].strip()
    place = after.find(content, len(before))
    if place < 0:
        raise InputError(
            f"the chat template does not show what the assistant says in turn {number + 1}: use another template, or "
            "mark its answers with {% generation %}"
        )
    return len(before), place + len(content), len(after)
