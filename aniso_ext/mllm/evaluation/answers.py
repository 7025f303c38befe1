"""Answers of a model: greedy text, or the likelihood of given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext.errors import InputError
from aniso_ext.mllm.templates import encode_conversation, expand_images, prompt_tokens

if TYPE_CHECKING:
    from aniso_ext.mllm.library import transformers
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM

IMAGE = "<image>"
Advance = Callable[[int], None]


def generate_answers(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    embeddings: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    advance: Advance | None = None,
) -> list[str]:
    """Greedy answers, one for each embedding and prompt; embeddings enter as they are, uncorrected.

    Args:
        embeddings: [N, D] array or tensor of the target modality.
        prompts: what the user says; ``<image>`` is put before it unless it is there.
        advance: called with the number of answers after each batch.

    Raises:
        InputError: not one prompt for each embedding.
    """
    rows = _rows(embeddings, prompts)
    answers: list[str] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            batch = rows[start : start + batch_size]
            tokens = _prompts(model, tokenizer, prompts[start : start + batch_size])
            ids, mask = _padded(tokens, int(pad or 0), left=True)
            found = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                embeddings=torch.from_numpy(batch).to(model.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
            answers += tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
            if advance is not None:
                advance(len(batch))
    return [answer.strip() for answer in answers]


def score_choices(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    embeddings: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    by_token: bool = True,
) -> list[np.ndarray]:
    """Log-likelihood of each choice as the answer, for each embedding and prompt.

    Args:
        embeddings, prompts: as for :func:`generate_answers`.
        choices: for each prompt, one or more answers.
        by_token: divide by the number of tokens, so that long answers are not at a disadvantage.
    """
    rows = _rows(embeddings, prompts)
    if len(choices) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(choices)} lists of choices: pass one list for each prompt")
    owner = np.repeat(np.arange(len(prompts)), [len(listed) for listed in choices])
    turns = [
        [{"role": "user", "content": _with_image(prompt)}, {"role": "assistant", "content": choice}]
        for prompt, listed in zip(prompts, choices, strict=True)
        for choice in listed
    ]
    encoded = [encode_conversation(tokenizer, each) for each in turns]  # the targets of training, their end included
    found = np.zeros(len(owner))
    with evaluating(model), torch.no_grad():
        for start in range(0, len(owner), batch_size):
            chosen = range(start, min(start + batch_size, len(owner)))
            ids, mask = _padded([_expanded(model, *encoded[i])[0] for i in chosen], 0, left=False)
            logits = model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                embeddings=torch.from_numpy(rows[owner[list(chosen)]]).to(model.device),
            ).logits
            logarithms = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            likely = logarithms.gather(2, ids[:, 1:, None].to(logits.device)).squeeze(2).cpu().numpy()
            for place, i in enumerate(chosen):
                targets = np.array(_expanded(model, *encoded[i])[1][1:])
                values = likely[place, : len(targets)][targets]
                found[i] = values.mean() if by_token else values.sum()
    return np.split(found, np.cumsum([len(listed) for listed in choices])[:-1])


@contextmanager
def evaluating(model: AnisoMLLMForCausalLM) -> Iterator[None]:
    """The model in evaluation, where no correction is applied, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _rows(embeddings: Any, prompts: Sequence[str]) -> np.ndarray:
    rows = embeddings.detach().float().cpu().numpy() if isinstance(embeddings, torch.Tensor) else np.asarray(embeddings)
    if rows.ndim != 2 or len(rows) != len(prompts):
        raise InputError(f"embeddings are {list(rows.shape)} for {len(prompts)} prompts: pass one row for each prompt")
    return rows.astype(np.float32, copy=False)


def _prompts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of prompts; equal prompts are rendered once."""
    known: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt not in known:
            config = model.config
            known[prompt] = prompt_tokens(
                tokenizer,
                _with_image(prompt),
                image_token_id=config.image_token_id,
                visual_tokens=config.visual_tokens,
            )
    return [known[prompt] for prompt in prompts]


def _with_image(prompt: str) -> str:
    return prompt if IMAGE in prompt else f"{IMAGE}\n{prompt}"


def _expanded(model: Any, ids: list[int], targets: list[bool]) -> tuple[list[int], list[bool]]:
    """Tokens and targets with the image token as often as the model has visual tokens."""
    image, count = model.config.image_token_id, model.config.visual_tokens
    return expand_images(ids, image, count), expand_images(ids, image, count, like=targets)


def _padded(tokens: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, tokens))
    ids = torch.full((len(tokens), longest), pad)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(tokens):
        place = slice(longest - len(values), longest) if left else slice(len(values))
        ids[row, place] = torch.tensor(values)
        mask[row, place] = 1
    return ids, mask
