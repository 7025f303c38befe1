"""Answers of a model: greedy text, or the likelihood of given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

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
    search: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
) -> list[str]:
    """Answers, one for each embedding and prompt, greedy by default; embeddings enter as they are, uncorrected.

    Args:
        embeddings: [N, D] array or tensor of the target modality.
        prompts: what the user says; ``<image>`` is put before it unless it is there.
        search: other options of transformers' ``generate``, e.g. ``{"num_beams": 3}``.
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
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **{"do_sample": False, **(search or {})},
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
    asked = [prompts[int(place)] for place in owner]
    answers = [choice for listed in choices for choice in listed]
    scored = score_answers(model, tokenizer, rows[owner], asked, answers, batch_size=batch_size)
    found = np.array([each.total / each.tokens if by_token else each.total for each in scored])
    return np.split(found, np.cumsum([len(listed) for listed in choices])[:-1])


class Likelihood(NamedTuple):
    """Of an answer: log-likelihood, tokens with its end token, and whether greedy decoding would give it."""

    total: float
    tokens: int
    greedy: bool


def score_answers(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    embeddings: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 64,
) -> list[Likelihood]:
    """How likely one answer is for each embedding and prompt; its tokens are the targets of training.

    Args:
        embeddings, prompts: as for :func:`generate_answers`.
        answers: one for each prompt.
    """
    rows = _rows(embeddings, prompts)
    encoded = [
        _expanded(
            model,
            *encode_conversation(
                tokenizer,
                [{"role": "user", "content": _with_image(prompt)}, {"role": "assistant", "content": answer}],
            ),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found: list[Likelihood] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            ids, mask = _padded([tokens for tokens, _ in batch], 0, left=False)
            logits = model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                embeddings=torch.from_numpy(rows[start : start + batch_size]).to(model.device),
            ).logits
            logarithms = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            following = ids[:, 1:].to(logits.device)
            likely = logarithms.gather(2, following[..., None]).squeeze(2).double().cpu().numpy()
            first = (logarithms.argmax(2) == following).cpu().numpy()
            for place, (_, targets) in enumerate(batch):
                counted = np.flatnonzero(targets[1:])
                total, greedy = float(likely[place, counted].sum()), bool(first[place, counted].all())
                found.append(Likelihood(total, len(counted), greedy))
    return found


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
