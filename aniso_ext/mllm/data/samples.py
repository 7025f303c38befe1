"""Conversations as tokens: one pass over the file, flat arrays, on disk if they are to be shared or kept."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.data.conversations import Conversation
from aniso_ext.mllm.data.index import EmbeddingIndex
from aniso_ext.mllm.templates import encode_conversation, expand_images

if TYPE_CHECKING:
    from aniso_ext.mllm.library import transformers

ON_LONG = ("fail", "truncate", "skip")
_ARRAYS = ("tokens", "targets", "ends", "rows")


@dataclass(frozen=True)
class Samples:
    """N samples as flat arrays, in memory or mapped from files.

    Attributes:
        tokens: int32, all samples one after another, image tokens expanded.
        targets: bool, which tokens the loss counts.
        ends: int64 [N], where each sample ends.
        rows: int64 [N], the row of each sample's embedding.
        truncated, skipped: ids of samples that were too long.
    """

    tokens: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    truncated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [N]."""
        return np.diff(self.ends, prepend=0)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of one sample."""
        end = int(self.ends[number])
        start = int(self.ends[number - 1]) if number else 0
        return self.tokens[start:end], self.targets[start:end]

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path, **more: Any) -> Samples:
        """Map what :meth:`save` wrote."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS), **more)


def prepare_samples(
    conversations: Iterable[Conversation],
    tokenizer: transformers.PreTrainedTokenizerBase,
    index: EmbeddingIndex,
    *,
    image_token_id: int,
    visual_tokens: int = 1,
    max_length: int = 2048,
    on_long: str = "fail",
) -> Samples:
    """Tokenise conversations and find their rows.

    Args:
        conversations: from :func:`read_conversations`.
        tokenizer: with a chat template and ``<image>``.
        index: of the embeddings.
        image_token_id, visual_tokens: of the model's configuration.
        max_length: most tokens of a sample, those of the image included.
        on_long: ``fail``, ``truncate`` (the end is lost) or ``skip`` longer ones.

    Raises:
        DataError: a sample without embedding, without image, without targets or too long; the message names it.
        InputError: a template that cannot be used, or an unknown ``on_long``.
    """
    if on_long not in ON_LONG:
        raise InputError(f"on_long must be one of {', '.join(ON_LONG)}, got {on_long!r}")
    tokens, targets, ends, rows = array("i"), bytearray(), array("q"), array("q")
    truncated, skipped = [], []
    for conversation in conversations:
        name = f"sample {conversation.id!r}"
        row = int(index.rows([conversation.embedding])[0])
        if row < 0:
            raise DataError(
                f"{name} has no embedding: {index.name} has no id {conversation.embedding!r} among its {len(index):,}; "
                "embed it, name its embedding with \"embedding\", or remove the sample"
            )
        ids, mask = _encode(tokenizer, conversation, image_token_id, visual_tokens)
        if len(ids) > max_length:
            if on_long == "fail":
                raise DataError(
                    f"{name} has {len(ids)} tokens, more than {max_length}: raise --max-length, or choose --on-long "
                    "truncate or skip"
                )
            if on_long == "skip":
                skipped.append(conversation.id)
                continue
            truncated.append(conversation.id)
            ids, mask = ids[:max_length], mask[:max_length]
        # the first token has nothing before it to be told from; in a pack that would be another sample
        mask[0] = False
        if not any(mask):
            raise DataError(
                f"{name} has nothing to learn from: all that the assistant says lies beyond its first {max_length} "
                "tokens; raise --max-length, choose --on-long skip, or remove the sample"
            )
        tokens.extend(ids)
        targets.extend(mask)
        ends.append(len(tokens))
        rows.append(row)
    if not ends:
        raise DataError("there are no samples to train on: the file is empty, or all were skipped")
    return Samples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(targets, np.bool_),
        np.frombuffer(ends, np.int64),
        np.frombuffer(rows, np.int64),
        tuple(truncated),
        tuple(skipped),
    )


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase, conversation: Conversation, image_token_id: int, visual_tokens: int
) -> tuple[list[int], list[bool]]:
    name = f"sample {conversation.id!r}"
    try:
        ids, mask = encode_conversation(tokenizer, conversation.messages)
    except InputError as error:
        raise DataError(f"{name}: {error}") from None
    images = ids.count(image_token_id)
    if images != 1:
        raise DataError(
            f"{name} has {images} image tokens where one is due: the chat template drops or repeats the first turn of "
            "the user, or the tokenizer does not know <image>; use the tokenizer that was saved with the model"
        )
    mask = expand_images(ids, image_token_id, visual_tokens, like=mask)
    return expand_images(ids, image_token_id, visual_tokens), mask
