"""Training: what moves in which stage, resume to the bit, packing, low-rank updates, files and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mllm_worlds import QUICK, World, weights
from test_mllm_correction import refined
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import aniso_ext as aniso
from aniso_ext.cli.main import app
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm import AnisoMLLMForCausalLM, Correction, TrainOptions, TrainReport, load_model, prompt_tokens, train
from aniso_ext.mllm.data import read_conversations

WORLD = World()


class Stopped(Exception):
    """A run that ends in the middle."""


def trained(output: Path, model: AnisoMLLMForCausalLM | None = None, **more: Any) -> TrainReport:
    options = replace(QUICK, **more.pop("options", {}))
    return train(
        WORLD.model() if model is None else model,
        WORLD.tokenizer,
        WORLD.captions,
        WORLD.embeddings,
        index=WORLD.ids,
        options=options,
        output=output,
        **more,
    )


def losses(output: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log" / f"{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_stages_learn_and_the_saved_model_says_what_it_saw(family: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = trained(out, WORLD.model(family), options={"projector_epochs": 2.0, "epochs": 50.0})
    for stage in ("projector", "full"):
        found = losses(out, stage)
        assert found[-1] < found[0]
    assert [stage.steps for stage in report.stages] == [6, 150]
    # twelve captions, equally frequent: what remains for a model that does not look at the embedding
    blind = math.log(12) / (report.targets / report.samples)
    assert losses(out, "full")[-1] < blind / 4

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    start = torch.tensor(
        [prompt_tokens(tokenizer, "<image>\nDescribe the image.", image_token_id=model.config.image_token_id)] * 12
    )
    spoken = model.generate(
        start, attention_mask=torch.ones_like(start), embeddings=torch.from_numpy(WORLD.embeddings[:12]),
        max_new_tokens=10, do_sample=False,
    )  # fmt: skip
    texts = tokenizer.batch_decode(spoken[:, start.shape[1] :], skip_special_tokens=True)
    right = sum(text == record["caption"] for text, record in zip(texts, WORLD.captions[:12], strict=True))
    assert right >= 10


def test_the_first_stage_moves_the_projector_alone(tmp_path: Path) -> None:
    model = WORLD.model()
    before = weights(model)
    report = trained(tmp_path / "run", model, options={"stages": ("projector",)})
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("projector.")}
    assert report.stages[0].trained_parameters == sum(before[name].numel() for name in moved)


def noisy(model: AnisoMLLMForCausalLM) -> AnisoMLLMForCausalLM:
    model.set_correction(Correction(refined(), noise_std=0.05, trainable=True))
    return model


@pytest.mark.parametrize("stopped_at", [("projector", 2), ("full", 4)])
def test_a_stopped_run_goes_on_to_the_bit(stopped_at: tuple[str, int], tmp_path: Path) -> None:
    options = {"save_every": 2, "projector_epochs": 1.0, "epochs": 2.0, "train_refiner": True, "weight_decay": 0.01}
    whole = noisy(WORLD.model())
    trained(tmp_path / "whole", whole, options=options)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == (stopped_at[0], stopped_at[1] + 1):
            raise Stopped

    with pytest.raises(Stopped):
        trained(tmp_path / "parts", noisy(WORLD.model()), options=options, progress=stop)
    parts = noisy(WORLD.model())
    torch.manual_seed(12345)
    trained(tmp_path / "parts", parts, options=options, resume=True)
    ours, theirs = weights(parts), weights(whole)
    assert any(name.startswith("correction.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for stage in ("projector", "full"):
        assert losses(tmp_path / "parts", stage) == losses(tmp_path / "whole", stage)
    fingerprints = {aniso.load_aligner(tmp_path / run / "aligner").fingerprint() for run in ("whole", "parts")}
    assert len(fingerprints) == 1


def test_a_resumed_run_must_be_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"max_steps": 1}
    trained(out, options=options)
    with pytest.raises(DataError, match="is not empty: name a new folder, or resume"):
        trained(out, options=options)
    with pytest.raises(DataError, match="a run with other options: resume it as it was started"):
        trained(out, options={**options, "learning_rate": 0.5}, resume=True)
    model = WORLD.model()
    model.set_correction(Correction.noise(0.1))
    with pytest.raises(DataError, match="a run with other aligner"):
        trained(out, model, options=options, resume=True)


def test_packed_and_unpacked_losses_agree(tmp_path: Path) -> None:
    # one step over all samples: the loss is the mean over the same targets, whatever the rows
    options = {"stages": ("full",), "max_steps": 1, "global_batch": 48, "device_batch": 48}
    packed = trained(tmp_path / "packed", options={**options, "packing": True})
    plain = trained(tmp_path / "plain", options=options)
    assert packed.rows < plain.rows == 48
    # a mean of 48 samples in float32: rounding in another order
    assert packed.stages[0].first_loss == pytest.approx(plain.stages[0].first_loss, rel=1e-6)


def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    found = []
    for compile in (False, True):
        options = {"compile": compile, "packing": True, "stages": ("full",), "max_steps": 2}
        trained(tmp_path / str(compile), options=options)
        found.append(losses(tmp_path / str(compile), "full"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert "_orig_mod" not in " ".join(weights(AnisoMLLMForCausalLM.from_pretrained(tmp_path / "True")))


def test_accumulated_rows_weigh_by_their_targets(tmp_path: Path) -> None:
    options = {"stages": ("full",), "max_steps": 1, "global_batch": 48}
    parts = trained(tmp_path / "parts", options={**options, "device_batch": 5})
    whole = trained(tmp_path / "whole", options={**options, "device_batch": 48})
    assert parts.stages[0].first_loss == pytest.approx(whole.stages[0].first_loss, rel=1e-6)


def test_the_loss_tunes_the_refiner_and_the_run_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = noisy(WORLD.model())
    report = trained(out, model, options={"max_steps": 3, "train_refiner": True})
    tuned = aniso.load_aligner(out / "aligner")
    assert tuned.fingerprint() != refined().fingerprint()
    assert report.aligner_fingerprint == f"{refined().fingerprint()}+noise:0.05"
    assert not any(name.startswith("correction.") for name in weights(out))
    assert json.loads((out / "config.json").read_text())["aligner_fingerprint"] == report.aligner_fingerprint
    untouched = Correction(refined(), trainable=True)
    model = WORLD.model()
    model.set_correction(untouched)
    trained(tmp_path / "frozen", model, options={"max_steps": 3})
    assert untouched.tuned_aligner().fingerprint() == refined().fingerprint()


def test_low_rank_updates_are_merged_into_the_saved_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = WORLD.model()
    before = weights(model)
    report = trained(out, model, options={"lora_rank": 2, "max_steps": 4, "warmup": 0.0})
    saved = weights(out)
    assert set(saved) == set(before)
    changed = {name for name in before if not torch.equal(saved[name], before[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name or "norm" in name for name in changed)
    for name in changed:
        if "_proj" in name:
            assert np.linalg.matrix_rank((saved[name] - before[name]).numpy(), tol=1e-4) <= 2
    assert report.stages[1].trained_parameters < report.stages[0].trained_parameters * 4
    model.eval()
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.tensor([[model.config.image_token_id, 9]])
    row = torch.from_numpy(WORLD.embeddings[:1])
    assert torch.equal(again(tokens, embeddings=row).logits, model(tokens, embeddings=row).logits)


def test_options_and_widths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name, value in (("global_batch", 0), ("warmup", 1.5), ("stages", ("full", "projector")), ("device", "tpu")):
        with pytest.raises(InputError, match=name):
            TrainOptions(**{name: value})
    with pytest.raises(InputError, match="embeddings have width 4, but the projector takes 16"):
        train(WORLD.model(), WORLD.tokenizer, [], np.eye(4), index=list("abcd"), output=tmp_path)
    with pytest.raises(DataError, match="2 ids for 48 embeddings"):
        train(WORLD.model(), WORLD.tokenizer, [], WORLD.embeddings, index=["a", "b"], output=tmp_path)
    with pytest.raises(InputError, match="need an index"):
        train(WORLD.model(), WORLD.tokenizer, [], WORLD.embeddings, output=tmp_path)
    with pytest.raises(InputError, match="train_refiner needs a correction"):
        trained(tmp_path / "run", options={"train_refiner": True})
    with pytest.raises(InputError, match="sharding needs several processes"):
        trained(tmp_path / "other", options={"fsdp": True})


def test_other_reports_are_written_or_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    trained(out, options={"report_to": ("tensorboard",), "max_steps": 1, "stages": ("projector",)})
    assert list((out / "projector" / "runs").rglob("events.out.tfevents.*"))
    monkeypatch.setattr("aniso_ext.mllm.training.find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb, or leave it out"):
        trained(tmp_path / "other", options={"report_to": ("wandb",)})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    names = {name: tmp_path / name for name in ("text.npy", "image.npy", "captions.jsonl", "run")}
    np.save(names["text.npy"], WORLD.embeddings)
    np.save(names["image.npy"], -WORLD.embeddings)
    names["captions.jsonl"].write_text("\n".join(map(json.dumps, WORLD.captions)))
    return names


def command(files: dict[str, Path], *more: str, model: str = "llama:tiny") -> list[str]:
    captions = str(files["captions.jsonl"])
    return [
        "train", "--model", model, "--source-embeddings", str(files["text.npy"]), "--conversations", captions,
        "--index", captions, "--output", str(files["run"]), "--global-batch", "16", "--vocab-size", "300",
        "--device", "cpu", *more,
    ]  # fmt: skip


def test_the_command_trains_what_the_library_trains(files: dict[str, Path], tmp_path: Path) -> None:
    given = ("--aligner", "mean_shift", "--target-embeddings", str(files["image.npy"]), "--json")
    result = CliRunner().invoke(app, command(files, *given))
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    texts = [message["content"] for sample in read_conversations(WORLD.captions) for message in sample.messages]
    model, tokenizer = load_model("llama:tiny", embedding_width=WORLD.width, texts=texts, vocab_size=300)
    correction = Correction.from_aligner("mean_shift", source=WORLD.embeddings, target=-WORLD.embeddings)
    model.set_correction(correction)
    train(
        model, tokenizer, WORLD.captions, WORLD.embeddings, index=WORLD.ids,
        options=TrainOptions(global_batch=16, device="cpu"), output=tmp_path / "ours",
    )  # fmt: skip
    assert data["aligner_fingerprint"] == correction.fingerprint
    assert losses(tmp_path / "ours", "full") == losses(files["run"], "full")
    assert data["stages"][1]["last_loss"] == losses(files["run"], "full")[-1]

    files["run"] = tmp_path / "second"
    onward = CliRunner().invoke(app, command(files, "--stages", "full", model=str(tmp_path / "ours")))
    assert onward.exit_code == 0, onward.stderr
    assert "full:" in onward.stdout and "projector:" not in onward.stdout


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--aligner", "noise:much"), 2, "must be noise:STD"),
        (("--aligner", "realign"), 2, "is fitted now and needs it"),
        (("--train-refiner",), 2, "only an anisoalign has a refiner"),
        (("--aligner", "gone"), 1, "gone holds no config.json"),
        (("--max-length", "5"), 1, "sample 's0' has 18 tokens, more than 5: raise --max-length"),
    ],
)
def test_the_command_says_what_is_wrong(files: dict[str, Path], more: tuple[str, ...], code: int, message: str) -> None:
    result = CliRunner().invoke(app, command(files, *more))
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_model_that_is_not_there_is_named(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, command(files, model=str(files["run"] / "gone")))
    assert result.exit_code == 1
    assert "gone cannot be loaded" in result.stderr and "pass a folder or a hub id" in result.stderr
