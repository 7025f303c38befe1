"""Captioning metrics against the reference implementation, and answers and scores of tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm import AnisoMLLMForCausalLM, small_language_model, small_tokenizer
from aniso_ext.mllm.evaluation import (
    bleu,
    cider_d,
    evaluate,
    generate_answers,
    read_questions,
    score_choices,
    words,
)

WORDS = ["a", "the", "red", "blue", "green", "shoe", "bag", "shirt", "on", "of", "with", "two", "small", "men"]
WIDTH = 8


def corpus(seed: int, images: int, references: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    random = np.random.default_rng(seed)

    def text() -> list[str]:
        return [str(word) for word in random.choice(WORDS, random.integers(1, 12))]

    wanted = [[text() for _ in range(references)] for _ in range(images)]
    found = [list(texts[0]) if random.random() < 0.3 else text() for texts in wanted]
    return found, wanted


@pytest.mark.parametrize("references", [1, 3])
def test_metrics_are_those_of_the_reference_implementation(references: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    found, wanted = corpus(references, 60, references)
    results = {image: [" ".join(text)] for image, text in enumerate(found)}
    truth = {image: [" ".join(text) for text in texts] for image, texts in enumerate(wanted)}
    mean, each = Cider().compute_score(truth, results)
    ours = cider_d(found, wanted)
    # the same sums in float64; the reference adds 1e-15 and 1e-9 to counts of BLEU
    assert ours == pytest.approx(each, rel=1e-12, abs=1e-12)
    assert ours.mean() == pytest.approx(mean, rel=1e-12)
    totals, _ = Bleu(4).compute_score(truth, results, verbose=0)
    if references > 1:  # of one reference it takes the average length, which is its length as well
        assert bleu(found, wanted) == pytest.approx(totals, rel=1e-7)
    assert bleu(found, wanted) == pytest.approx(totals, rel=1e-7)


def test_metrics_by_hand() -> None:
    """A caption that is its reference has CIDEr-D 10 x (4 cosines of 1 over 4); no common word has 0."""
    same = ["a", "red", "shoe", "on", "two", "bags"]
    other = ["the", "blue", "shirt", "with", "green", "men"]
    assert cider_d([same, same], [[same], [other]]) == pytest.approx([10.0, 0.0])
    # 3 of 4 words, 1 of 3 pairs, no triple; as long as the reference
    found, wanted = ["a", "red", "bag", "here"], ["a", "red", "shoe", "here"]
    assert bleu([found], [[wanted]]) == pytest.approx([3 / 4, math.sqrt(3 / 4 / 3), 0.0, 0.0])
    # half as long: exp(1 - 4/2)
    assert bleu([wanted[:2]], [[wanted]])[0] == pytest.approx(math.exp(-1))
    with pytest.raises(InputError, match="1 captions and 0 lists of references"):
        cider_d([same], [])
    assert words("A man’s T-Shirt!") == ["a", "man’s", "t", "shirt"]


@pytest.fixture(scope="module")
def trained() -> tuple[AnisoMLLMForCausalLM, Any]:
    """A model that has learned the colour of four embeddings by heart."""
    tokenizer = small_tokenizer(["Describe the image.", "What colour is it? red blue green black"], 320)
    model = AnisoMLLMForCausalLM.from_language_model(
        small_language_model(vocab_size=len(tokenizer)), tokenizer, embedding_width=WIDTH
    )
    rows, answers = torch.eye(WIDTH)[:4], ("red", "blue", "green", "black")
    from aniso_ext.mllm.data.batches import IGNORED
    from aniso_ext.mllm.templates import encode_conversation

    batch = []
    for answer in answers:
        turns = [
            {"role": "user", "content": "<image>\nWhat colour is it?"},
            {"role": "assistant", "content": answer},
        ]
        batch.append(encode_conversation(tokenizer, turns))
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(4, longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (tokens, targets) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(targets), torch.tensor(tokens), IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(120):
        loss = model.train()(ids, attention_mask=mask, labels=labels, embeddings=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    return model, tokenizer


def test_answers_and_likelihoods_follow_the_embedding(trained: tuple[AnisoMLLMForCausalLM, Any]) -> None:
    model, tokenizer = trained
    rows = np.eye(WIDTH, dtype=np.float32)[[3, 1, 0, 2]]
    prompts = ["What colour is it?"] * 4
    for size in (1, 3, 64):  # prompts of one batch share their padding
        assert generate_answers(model, tokenizer, rows, prompts, batch_size=size) == ["black", "blue", "red", "green"]
    assert model.training
    choices = [("red", "black"), ("green", "blue"), ("red", "blue", "green"), ("black", "green")]
    found = score_choices(model, tokenizer, rows, prompts, choices, batch_size=3)
    assert [int(values.argmax()) for values in found] == [1, 1, 0, 1]
    (likely,) = score_choices(model, tokenizer, rows[:1], prompts[:1], [("black",)], by_token=False)
    assert -0.5 < likely[0] < 0
    counted = {"id": 7, "kind": "attribute", "attribute": "count", "question": "How many?", "answer": 0}
    assert read_questions([counted])[0].answer == "0"
    with pytest.raises(InputError, match=r"embeddings are \[4, 8\] for 3 prompts"):
        generate_answers(model, tokenizer, rows, prompts[:3])


def test_an_evaluation_scores_and_keeps_every_answer(
    trained: tuple[AnisoMLLMForCausalLM, Any], tmp_path: Path
) -> None:
    model, tokenizer = trained
    asked = "What colour is it?"
    questions = [
        {"id": "k", "kind": "attribute", "attribute": "colour", "question": asked, "answer": "Black"},
        {"id": "b", "kind": "attribute", "attribute": "colour", "question": asked, "answer": "red"},
        {"id": "g", "kind": "multiple_choice", "question": asked, "choices": ["red", "green"], "answer": "green"},
        {"id": "r", "kind": "caption", "question": asked, "references": ["red"]},
        {"id": "b", "kind": "caption", "question": asked, "references": ["blue"]},
    ]
    rows = np.eye(WIDTH, dtype=np.float32)[:4]
    steps: list[tuple[int, int]] = []
    report = evaluate(
        model,
        tokenizer,
        rows,
        questions,
        index=["r", "b", "g", "k"],
        output=tmp_path,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.scores["attribute:colour"].value == 0.5
    assert report.scores["attribute"].error == pytest.approx(0.125**0.5)
    assert report.scores["multiple_choice"].value == 1
    assert report.scores["bleu_1"].value == 1 and report.scores["cider_d"].count == 2
    assert steps[-1] == (5, 5)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ["black", "blue", "green", "red", "blue"]
    assert [line["correct"] for line in lines] == [True, False, True, None, None]
    with pytest.raises(DataError, match="question 'x' has no embedding: the index has no such id"):
        evaluate(model, tokenizer, rows, [{**questions[0], "id": "x"}], index=["r", "b", "g", "k"])
    with pytest.raises(InputError, match="the embeddings have width 4, but the projector takes 8"):
        evaluate(model, tokenizer, rows[:, :4], questions, index=["r", "b", "g", "k"])


@pytest.mark.parametrize(
    "record, message",
    [
        ({"kind": "caption"}, "question 1 has no id"),
        ({"id": "7", "kind": "essay"}, r"id '7'\) has the kind 'essay': choose caption, multiple_choice"),
        ({"id": "7", "kind": "caption"}, "has no references"),
        ({"id": "7", "kind": "attribute", "question": "Q", "answer": "a"}, "does not say which attribute"),
        ({"id": "7", "kind": "yes_no", "question": "Q", "answer": "maybe"}, "'maybe': yes or no is due"),
        (
            {"id": "7", "kind": "multiple_choice", "question": "Q", "answer": "a", "choices": ["b"]},
            "none of its choices",
        ),
        ({"id": "7", "kind": "multiple_choice", "question": "Q", "answer": "a"}, "has no choices"),
        ({"id": "7", "kind": "attribute", "answer": "a"}, "asks nothing"),
        ({"id": "7", "kind": "caption", "references": "a red shoe"}, "has references 'a red shoe': write a list"),
        (
            {"id": "7", "kind": "multiple_choice", "question": "Q", "answer": "a", "choices": ["a", "a"]},
            "has a choice twice",
        ),
    ],
)
def test_a_question_that_cannot_be_used_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions([record])
