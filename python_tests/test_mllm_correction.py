"""Stand-ins on the fly: the same as from the aligner, differentiable into the refiner, within its bounds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mllm_worlds import World

import aniso_ext as aniso
from aniso_ext.align import TrainingOptions
from aniso_ext.errors import InputError
from aniso_ext.mllm import Correction
from aniso_ext.ops import encode

WIDTH, ROWS = 16, 400


@cache
def pairs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    source = random.standard_normal((ROWS, WIDTH)) * np.linspace(2, 0.3, WIDTH) + 0.5
    target = random.standard_normal((ROWS, WIDTH)) * np.linspace(1.5, 0.5, WIDTH) - 0.5
    return tuple(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (source, target))


@cache
def refined(literal: bool = False) -> aniso.AnisoAlign:
    short = TrainingOptions(steps=20, batch_rows=128, warmup_steps=2)
    aligner = aniso.AnisoAlign(rank=8, prior_training=short, refinement_training=short, literal=literal)
    aligner.fit(*pairs())
    aligner = aligner.calibrated(pairs()[0])
    # so few steps may leave the refiner at its start, where the last layer is zero and stops every gradient
    arrays = aligner._arrays()
    random = np.random.default_rng(4)
    moved = 0.3 * random.standard_normal(tuple(arrays["refiner.last.weight"].shape))
    arrays["refiner.last.weight"] = torch.from_numpy(moved).float()
    aligner._install(arrays, WIDTH)
    return aligner


def given(rows: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(pairs()[0][:rows]).to(dtype)


@pytest.mark.parametrize("method", ["identity", "mean_shift", "realign", "c3_paper", "gaussian_monge"])
def test_a_method_by_name_gives_what_its_aligner_gives(method: str) -> None:
    correction = Correction.from_aligner(method, source=pairs()[0], target=pairs()[1])
    aligner = aniso.make_aligner(method).fit(*pairs())
    assert torch.equal(correction(given()), aligner.transform(given()))
    assert correction.fingerprint == aligner.fingerprint()


@pytest.mark.parametrize("literal", [False, True])
def test_a_refiner_that_takes_gradients_starts_where_the_aligner_is(literal: bool) -> None:
    aligner = refined(literal)
    correction = Correction(aligner, trainable=True)
    # both compute in float64 here: the folded and the plain products differ by their order alone
    expected = aligner.transform_batch(given(dtype=torch.float64))
    correction.double()
    ours = correction(given(dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_an_artefact_by_its_folder(tmp_path: Path) -> None:
    refined().save_pretrained(tmp_path)
    correction = Correction.from_aligner(tmp_path)
    assert torch.equal(correction(given()), refined().transform(given()))


def test_gradients_reach_every_parameter_of_the_refiner_as_differences_say() -> None:
    correction = Correction(refined(), trainable=True).double()
    rows = given(8, torch.float64)
    weight = torch.from_numpy(np.random.default_rng(2).standard_normal((8, WIDTH)))

    def loss() -> torch.Tensor:
        return (correction(rows) * weight).sum()

    loss().backward()
    step = 1e-6
    random = np.random.default_rng(3)
    for name, value in correction.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 0, name
        direction = torch.from_numpy(random.standard_normal(tuple(value.shape)))
        with torch.no_grad():
            value += step * direction
            above = loss()
            value -= 2 * step * direction
            below = loss()
            value += step * direction
        slope = float((above - below) / (2 * step))
        # central differences err by step^2 and by rounding over step, both far below 1e-6 of these sums
        assert slope == pytest.approx(float((value.grad * direction).sum()), rel=1e-5, abs=1e-7), name


def test_the_bounds_hold_after_steps_of_any_size() -> None:
    aligner = refined()
    correction = Correction(aligner, trainable=True)
    optimizer = torch.optim.SGD(correction.parameters(), lr=1e4)
    for _ in range(3):
        optimizer.zero_grad()
        correction(given())[:, 0].sum().backward()
        optimizer.step()
    assert not torch.equal(correction.refined.refiner.last.weight, aligner.refiner_.last.weight)
    frame = aligner.frame_.with_output_mean(None).to(dtype=torch.float32)
    tuned = correction.tuned_aligner()
    uncalibrated = tuned._uncalibrated().transform_batch(given())
    start = encode(given(), frame)
    blocks = frame.blocks
    phases = torch.atan2(start[:, :blocks], start[:, blocks : 2 * blocks])
    # rows come out scaled to length one, which turns no phase
    coordinates = (uncalibrated @ frame.basis).unflatten(1, (blocks, 2))
    turned = torch.atan2(coordinates[..., 1], coordinates[..., 0]) - phases
    turned = torch.remainder(turned + torch.pi, 2 * torch.pi) - torch.pi
    bound = aligner.refiner_.bounds.a_theta
    assert turned.abs().max() <= bound + 1e-4
    assert turned.abs().max() > 0.9 * bound  # steps this large meet the bound


def test_the_tuned_aligner_is_one_of_its_own(tmp_path: Path) -> None:
    correction = Correction(refined(), trainable=True)
    before = refined().fingerprint()
    with torch.no_grad():
        correction.refined.refiner.last.bias += 0.1
    tuned = correction.tuned_aligner()
    assert tuned.fingerprint() != before == refined().fingerprint()
    again = aniso.load_aligner(tuned.save_pretrained(tmp_path))
    torch.testing.assert_close(again.transform(given()), correction(given()), rtol=0, atol=1e-5)


def test_autocast_leaves_stand_ins_alone() -> None:
    for correction in (Correction(refined()), Correction(refined(), trainable=True)):
        plain = correction(given())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(correction(given()), plain)


def test_noise_has_its_deviation_and_comes_from_the_global_generator() -> None:
    rows = torch.nn.functional.normalize(torch.ones(2000, 64), dim=1)
    torch.manual_seed(1)
    noisy = Correction.noise(0.1)(rows)
    torch.manual_seed(1)
    drawn = rows + 0.1 * torch.randn(2000, 64)
    torch.testing.assert_close(noisy, drawn / drawn.norm(dim=1, keepdim=True))
    assert not torch.equal(Correction.noise(0.1)(rows), noisy)
    with_aligner = Correction.from_aligner("mean_shift", source=pairs()[0], target=pairs()[1], noise_std=0.05)
    assert with_aligner.fingerprint.endswith("+noise:0.05")


def test_a_model_corrects_in_training_alone() -> None:
    world = World()
    model = world.model()
    correction = Correction.from_aligner("mean_shift", source=pairs()[0], target=pairs()[1])
    model.set_correction(correction)
    image = model.config.image_token_id
    tokens = torch.tensor([[5, image, 7]])
    row = torch.from_numpy(world.embeddings[:1])
    plain = world.model().eval()
    assert torch.equal(model.eval()(tokens, embeddings=row).logits, plain(tokens, embeddings=row).logits)
    corrected = plain(tokens, embeddings=correction(row)).logits
    assert torch.equal(model.train()(tokens, embeddings=row).logits, corrected)


def test_messages_say_what_to_do() -> None:
    with pytest.raises(InputError, match="no refiner to train: pass an anisoalign"):
        Correction(aniso.make_aligner("mean_shift").fit(*pairs()), trainable=True)
    with pytest.raises(InputError, match="fitted on source and target embeddings"):
        Correction.from_aligner("realign")
    with pytest.raises(InputError, match="noise_std must be finite"):
        Correction.noise(-1)
    with pytest.raises(InputError, match=r"fitted at width 8, but the projector takes 16.*one encoder"):
        narrow = aniso.make_aligner("mean_shift").fit(np.eye(8), -np.eye(8))
        World().model().set_correction(Correction(narrow))
