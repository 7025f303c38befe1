"""The multimodal model and its trainer on tiny language models: masks, packing, stages, resume, refiner, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aniso_ext as aniso
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm import (
    AnisoMLLMForCausalLM,
    Correction,
    TrainOptions,
    prompt_tokens,
    small_language_model,
    small_tokenizer,
    train,
)
from aniso_ext.mllm.templates import encode_conversation

WIDTH = 8
COLOURS = ("red", "blue", "green", "black")
IDS = [str(number) for number in range(32)]
ROWS = np.random.default_rng(0).standard_normal((32, WIDTH)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
SAMPLES = [
    {"id": name, "conversations": [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": COLOURS[row % 4]}]}
    for row, name in enumerate(IDS)
]
OPTIONS = TrainOptions(
    projector_learning_rate=1e-2, learning_rate=1e-2, projector_epochs=2, epochs=6, global_batch=8, device="cpu"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    return small_tokenizer(["Colour? red blue green black", "Describe the image."], 300)


def model_for(tokens: Any, family: str = "llama", seed: int = 0) -> AnisoMLLMForCausalLM:
    torch.manual_seed(seed)
    return AnisoMLLMForCausalLM.from_language_model(
        small_language_model(family, vocab_size=len(tokens), seed=seed), tokens, embedding_width=WIDTH
    )


def said(tokens: Any) -> int:
    """Tokens of all answers, the end of each included."""
    return sum(len(tokens(COLOURS[row % 4]).input_ids) + 1 for row in range(32))


def weights(model: AnisoMLLMForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_stages_learn_and_the_saved_model_says_the_same(family: str, tmp_path: Path) -> None:
    tokens = tokenizer()
    model = model_for(tokens, family)
    before = weights(model)
    report = train(model, tokens, SAMPLES, ROWS, index=IDS, options=OPTIONS, output=tmp_path)
    projector, full = report.stages
    assert (projector.name, projector.steps, full.name, full.steps) == ("projector", 8, "full", 24)
    assert projector.trained_parameters == sum(value.numel() for value in model.projector.parameters())
    assert full.trained_parameters > projector.trained_parameters
    assert full.last_loss is not None and projector.first_loss is not None
    assert full.last_loss < 0.5 * projector.first_loss
    assert report.samples == 32 and report.targets == said(tokens)
    moved = model.projector.state_dict(prefix="projector.")
    assert all(not torch.equal(before[name], value) for name, value in moved.items())
    prompt = torch.tensor([prompt_tokens(tokens, "<image>\nColour?", image_token_id=model.config.image_token_id)])
    asked = {"input_ids": prompt, "embeddings": torch.from_numpy(ROWS[:1]), "max_new_tokens": 4, "do_sample": False}
    found = model.eval().generate(**asked)
    again = AnisoMLLMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(**asked), found)
    with torch.no_grad():
        inputs = {"input_ids": prompt, "embeddings": torch.from_numpy(ROWS[:1])}
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    lines = [json.loads(line) for line in (tmp_path / "log" / "full.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 24


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    from dataclasses import replace

    options = replace(OPTIONS, save_every=3)
    tokens = tokenizer()
    whole = model_for(tokens)
    train(whole, tokens, SAMPLES, ROWS, index=IDS, options=options, output=tmp_path / "whole")

    def stop(stage: str, step: int, steps: int) -> None:
        if stage == "full" and step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            model_for(tokens), tokens, SAMPLES, ROWS, index=IDS, options=options, output=tmp_path / "cut", progress=stop
        )
    resumed = model_for(tokens)
    train(resumed, tokens, SAMPLES, ROWS, index=IDS, options=options, output=tmp_path / "cut", resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    with pytest.raises(DataError, match="holds a run with other options"):
        other = replace(options, learning_rate=1e-3)
        train(model_for(tokens), tokens, SAMPLES, ROWS, index=IDS, options=other, output=tmp_path / "cut", resume=True)


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_the_assistant_alone_is_trained_on(template: str) -> None:
    tokens = tokenizer()
    if template == "chatml":
        tokens.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
        tokens.chat_template = CHATML
    turns = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": "<image>\nColour?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": "green"},
    ]
    ids, targets = encode_conversation(tokens, turns)
    said = "".join(tokens.decode([token]) if target else "·" for token, target in zip(ids, targets, strict=True))
    end = "<|end|>" if template == "marked" else "<|im_end|>"
    assert [text for text in said.split("·") if text] == [f"blue{end}", f"green{end}"]


def test_packed_samples_do_not_see_each_other() -> None:
    """Losses of samples in one row with positions that start anew are those of samples in rows of their own."""
    tokens = tokenizer()
    model = model_for(tokens).eval()
    image = model.config.image_token_id
    random = np.random.default_rng(1)
    texts = [torch.tensor([image, *random.integers(6, 260, size)]) for size in (5, 9, 3)]
    rows = torch.from_numpy(ROWS[:3])
    with torch.no_grad():
        apart = [model(text[None], embeddings=row[None]).logits[0] for text, row in zip(texts, rows, strict=True)]
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        packed = model(torch.cat(texts)[None], embeddings=rows, position_ids=positions[None]).logits[0]
    # sums of a few dozen float32 products in another order
    assert torch.allclose(packed, torch.cat(apart), atol=2e-5)


def test_packing_trains_on_the_same_targets(tmp_path: Path) -> None:
    from dataclasses import replace

    tokens = tokenizer()
    options = replace(OPTIONS, packing=True, max_length=64, epochs=2)
    report = train(model_for(tokens), tokens, SAMPLES, ROWS, index=IDS, options=options, output=tmp_path)
    assert report.samples == 32 and report.targets == said(tokens) and report.rows < 16


def test_the_loss_of_the_language_model_reaches_the_refiner_within_its_bounds(tmp_path: Path) -> None:
    from dataclasses import replace

    short = aniso.align.TrainingOptions(steps=20, batch_rows=64)
    source, target = (np.random.default_rng(seed).standard_normal((400, WIDTH)) + 0.5 for seed in (2, 3))
    sides = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (source, target)]
    aligner = aniso.AnisoAlign(rank=4, prior_training=short, refinement_training=short).fit(*sides)
    tokens = tokenizer()
    model = model_for(tokens)
    model.set_correction(Correction.from_aligner(aligner, trainable=True))
    assert model.correction is not None and model.correction.refined is not None
    start = {name: value.clone() for name, value in model.correction.refined.refiner.named_parameters()}
    options = replace(OPTIONS, train_refiner=True, epochs=2)
    train(model, tokens, SAMPLES, ROWS, index=IDS, options=options, output=tmp_path)
    moved = dict(model.correction.refined.refiner.named_parameters())
    assert any(not torch.equal(moved[name], value) for name, value in start.items())
    tuned = aniso.load_aligner(tmp_path / "aligner")
    refined, closed = tuned.transform(ROWS.astype(np.float64)), tuned.transform(ROWS.astype(np.float64), refine=False)
    bounds = tuned.refiner_.bounds
    kappa = np.sqrt((np.exp(bounds.a_rho) - 1) ** 2 + 4 * np.exp(bounds.a_rho) * np.sin(bounds.a_theta / 2) ** 2)
    # before it is normalised and recentred a unit row moves by at most kappa |c| + sqrt(D) a_v; both can enlarge that
    assert 0 < np.linalg.norm(refined - closed, axis=1).max() < 4 * (kappa + np.sqrt(WIDTH) * bounds.a_v)
    # an evaluation sees embeddings as they are
    ids = torch.tensor([[model.config.image_token_id, 7]])
    with torch.no_grad():
        one = model.eval()(ids, embeddings=torch.from_numpy(ROWS[:1])).logits
        model.set_correction(None)
        assert torch.equal(model(ids, embeddings=torch.from_numpy(ROWS[:1])).logits, one)


@pytest.mark.parametrize(
    "samples, message",
    [
        ([{"id": "99", "caption": "red"}], "sample '99' has no embedding: .* has no id '99' among its 32"),
        ([{"caption": "red"}], "record 1 has no id"),
        ([{"id": "1", "conversations": []}], "sample '1' .* has no turns: write"),
        ([{"id": "1", "caption": " "}], "sample '1'.* is empty"),
        ([{"id": "1", "caption": "red blue " * 2000}], "sample '1' has .* tokens, more than 2048: raise --max-length"),
        ([], "there are no samples"),
    ],
    ids=["no embedding", "no id", "no turns", "empty", "long", "none"],
)
def test_a_sample_that_cannot_be_used_is_named(samples: list[Any], message: str, tmp_path: Path) -> None:
    tokens = tokenizer()
    with pytest.raises(DataError, match=message):
        train(model_for(tokens), tokens, samples, ROWS, index=IDS, options=OPTIONS, output=tmp_path / "run")


def test_widths_and_templates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokens = tokenizer()
    model = model_for(tokens)
    with pytest.raises(InputError, match="the embeddings have width 4, but the projector takes 8"):
        train(model, tokens, SAMPLES, ROWS[:, :4], index=IDS, options=OPTIONS, output=tmp_path / "run")
    other = aniso.make_aligner("mean_shift").fit(np.eye(4), -np.eye(4))
    with pytest.raises(InputError, match="the aligner was fitted at width 4, but the projector takes 8"):
        model.set_correction(Correction.from_aligner(other))
    with pytest.raises(InputError, match="embeddings that are no files need an index"):
        train(model, tokens, SAMPLES, ROWS, options=OPTIONS, output=tmp_path / "run")
    tokens.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        train(model, tokens, SAMPLES, ROWS, index=IDS, options=OPTIONS, output=tmp_path / "run")
