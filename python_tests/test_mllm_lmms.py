"""The adapter for lmms-eval: images become embeddings, answers and losses are those of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lmms_stand_in import provide_lmms_eval
from mllm_worlds import World
from PIL import Image
from toy_encoder import WIDTH, toy_encoder

from aniso_ext.encode import Encoder
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.evaluation import score_choices
from aniso_ext.mllm.templates import encode_conversation
from aniso_ext.torchvision import prepare_torchvision

prepare_torchvision()
provide_lmms_eval()
from lmms_eval.api.instance import Instance  # noqa: E402

from aniso_ext.mllm.evaluation.lmms import AnisoMLLM, manifest  # noqa: E402

WORLD = World(width=WIDTH)
RANDOM = np.random.default_rng(0)
PICTURES = [Image.fromarray(RANDOM.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(3)]
DOCUMENTS = [{"image": picture, "answer": "red"} for picture in PICTURES]
DOCUMENTS += [{"image": None}, {"image": "clip.mp4"}]


COLOURS, ASKED = ("red", "blue", "green"), "Which colour?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the colour of three pictures by heart."""
    folder = tmp_path_factory.mktemp("run")
    model = WORLD.model().train()
    batch = []
    for colour in COLOURS:
        turns = [{"role": "user", "content": f"<image>\n{ASKED}"}, {"role": "assistant", "content": colour}]
        batch.append(encode_conversation(WORLD.tokenizer, turns))
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, targets) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(targets), torch.tensor(tokens), -100)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(ids, attention_mask=mask, labels=labels, embeddings=rows([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    model.save_pretrained(folder)
    WORLD.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AnisoMLLM:
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: toy_encoder())
    made = AnisoMLLM(str(folder), encoder="toy", device="cpu", batch_size="2")
    made.task_dict["shapes"] = {"test": DOCUMENTS}
    return made


def visuals(document: dict[str, Any]) -> list[Any]:
    return [] if document["image"] is None else [document["image"]]


def request(kind: str, number: int, question: str, more: Any, finder: Any = visuals) -> Instance:
    arguments = (question, more, finder, number, "shapes", "test")
    return Instance(kind, arguments, 0, {"task": "shapes", "doc_id": number, "repeats": 1})


def rows(numbers: list[int]) -> torch.Tensor:
    encoder = toy_encoder()
    return encoder.encode_images(torch.stack([encoder.transform(PICTURES[number]) for number in numbers]))


def test_answers_are_those_of_the_embeddings_of_the_images(adapter: AnisoMLLM) -> None:
    order = [2, 0, 1, 0]
    options = [{"max_new_tokens": 8, "temperature": 0, "until": ["\n\n"]}, {"max_new_tokens": 9, "num_beams": 2}]
    requests = [request("generate_until", n, f"<image> {ASKED} <image>", options[n == 1]) for n in order]
    assert adapter.generate_until(requests) == ["green", "red", "blue", "red"]
    # a stop text cuts, the first of several
    stops = {"max_new_tokens": 8, "until": ["een", "r"]}
    assert adapter.generate_until([request("generate_until", 2, ASKED, stops)]) == ["g"]


def test_losses_are_least_for_the_likeliest_choice_and_tell_what_is_greedy(adapter: AnisoMLLM) -> None:
    requests = [request("loglikelihood", n, ASKED, f" {colour}") for n in (0, 1) for colour in COLOURS]
    found = adapter.loglikelihood(requests)
    expected = score_choices(adapter.model, adapter.tokenizer, rows([0, 1]), [ASKED] * 2, [COLOURS] * 2)
    # batches of other sizes, in float32
    assert [loss for loss, _ in found] == pytest.approx(-np.concatenate(expected), rel=1e-4, abs=1e-6)
    assert [greedy for _, greedy in found] == [True, False, False, False, True, False]
    (by_function,) = adapter.loglikelihood([request("loglikelihood", 0, ASKED, lambda document: document["answer"])])
    assert by_function == (pytest.approx(found[0][0], rel=1e-4, abs=1e-6), True)


def test_each_image_is_embedded_once(adapter: AnisoMLLM) -> None:
    seen: list[int] = []

    def counted(document: dict[str, Any]) -> list[Any]:
        seen.append(1)
        return visuals(document)

    adapter.loglikelihood([request("loglikelihood", 0, "What?", text, counted) for text in ("a", "b", "c")])
    assert len(seen) == 1


def test_what_the_model_cannot_read_is_named(adapter: AnisoMLLM, folder: Path, monkeypatch: Any) -> None:
    with pytest.raises(DataError, match=r"document 3 of shapes \(test\) has 0 images"):
        adapter.generate_until([request("generate_until", 3, "What?", {})])
    with pytest.raises(DataError, match=r"document 4 of shapes .* has a str where an image is due"):
        adapter.generate_until([request("generate_until", 4, "What?", {})])
    metadata = {"task": "shapes", "doc_id": 0, "repeats": 1}
    with pytest.raises(DataError, match="acc_mutual_info"):
        adapter.loglikelihood([Instance("loglikelihood", ("", "a"), 0, metadata)])
    with pytest.raises(InputError, match="leave tasks of several rounds out"):
        adapter.generate_until_multi_round([])
    with pytest.raises(InputError, match="batch_size must be a number"):
        AnisoMLLM(str(folder), encoder="toy", batch_size="auto")
    with pytest.raises(InputError, match=r"encoder.json is not there: pass encoder=NAME"):
        AnisoMLLM(str(folder), device="cpu")
    with pytest.raises(InputError, match="holds no trained model"):
        AnisoMLLM(str(folder / "nowhere"), device="cpu")


def test_another_encoder_than_that_of_the_training_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run = shutil.copytree(folder, tmp_path / "run")
    toy_encoder(seed=1).record.write(run)
    asked: list[Any] = []
    monkeypatch.setattr(Encoder, "load", lambda *given, **options: asked.append((given, options)) or toy_encoder())
    with pytest.raises(InputError, match="trained on embeddings of toy 1, but the encoder is toy 0"):
        AnisoMLLM(str(run), device="cpu")
    assert asked == [(("toy",), {"pretrained": None, "checkpoint": None, "device": "cpu"})]


def test_lmms_eval_finds_it_by_name() -> None:
    made = manifest()
    module, _, name = str(made.simple_class_path).rpartition(".")
    assert (made.model_id, module, name) == ("aniso_mllm", AnisoMLLM.__module__, AnisoMLLM.__name__)
