"""A damaged or foreign artefact is refused in one line that names the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aniso_ext as aniso
from aniso_ext.errors import ArtefactError

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = np.random.default_rng(0).standard_normal((200, 10)) + 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    aligner = aniso.AnisoAlign(rank=4, refine=False, knots=16).fit(unit[:90], -unit[90:])
    return aligner.save_pretrained(tmp_path_factory.mktemp("artefact"))


def put(config: Config, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def swap_knots(tensors: Tensors) -> None:
    tensors["radius_target_knots"] = tensors["radius_target_knots"].flip(1).contiguous()


def set_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Config, Tensors], None]:
    def change(config: Config, tensors: Tensors) -> None:
        tensors[name][index] = value

    return change


CHANGES: dict[str, tuple[Callable[[Config, Tensors], Any], str]] = {
    "another format": (lambda c, t: put(c, "format", "torch"), "format is not 'aniso_ext.aligner'"),
    "a later version": (lambda c, t: put(c, "format_version", 3), "format_version is 3, this version .* reads 1 and 2"),
    "no version": (lambda c, t: c.pop("format_version"), "format_version is None"),
    "unknown method": (lambda c, t: put(c, "method", "warp"), "method: unknown aligner 'warp'"),
    "another method": (lambda c, t: c.update(method="realign", options={}), "missing arrays .'scale'., unknown arrays"),
    "method of wrong type": (lambda c, t: put(c, "method", 3), "method must be of type str, got 3"),
    "unknown option": (lambda c, t: put(c, "options.speed", 3), "options has .'speed'., which anisoalign does not"),
    "impossible option": (lambda c, t: put(c, "options.rank", 5), "options: rank must be an even integer"),
    "option of wrong type": (lambda c, t: put(c, "options.rank", [4]), "options: rank must be an even integer"),
    "no options": (lambda c, t: c.pop("options"), "options must be of type dict, got None"),
    "a refiner without arrays": (lambda c, t: put(c, "options.refine", True), "refine is True, but there are no"),
    "wrong width": (lambda c, t: put(c, "width", 11), r"basis has shape \[10, 4\], expected \[D, R\] with D = 11"),
    "width of wrong type": (lambda c, t: put(c, "width", "10"), "width must be of type int, got '10'"),
    "width zero": (lambda c, t: put(c, "width", 0), "width must be positive, got 0"),
    "no fingerprint": (lambda c, t: c.pop("fingerprint"), "fingerprint must be of type str"),
    "corpora of wrong type": (lambda c, t: put(c, "corpora", []), "corpora must be of type dict"),
    "complement of another": (
        lambda c, t: put(c, "options.complement", "diagonal"),
        "complement_scale must have shape",
    ),
    "missing array": (lambda c, t: t.pop("basis"), "missing arrays .'basis'."),
    "unknown array": (lambda c, t: t.update(bases=t["basis"].clone()), "unknown arrays .'bases'."),
    "single precision": (
        lambda c, t: t.update(basis=t["basis"].float()),
        "basis is torch.float32, expected torch.float64",
    ),
    "transposed basis": (lambda c, t: t.update(basis=t["basis"].T.contiguous()), r"basis has shape \[4, 10\]"),
    "odd rank": (lambda c, t: t.update(basis=t["basis"][:, :3].contiguous()), "the rank must be even"),
    "basis of another rank": (
        lambda c, t: t.update(basis=t["basis"][:, :2].contiguous()),
        "radius_source_knots must have",
    ),
    "long mean": (lambda c, t: t.update(source_mean=torch.zeros(11).double()), r"source_mean has shape \[11\]"),
    "scalar mean": (lambda c, t: t.update(target_mean=torch.zeros(()).double()), r"target_mean has shape \[\]"),
    "uneven knots": (
        lambda c, t: t.update(radius_target_knots=t["radius_target_knots"][:, :9].contiguous()),
        r"radius_(source|target)_knots has shape .* expected \[M, K\]",
    ),
    "knots of another rank": (
        lambda c, t: t.update(
            radius_source_knots=t["radius_source_knots"][:1].clone(),
            radius_target_knots=t["radius_target_knots"][:1].clone(),
        ),
        "radius_source_knots must have shape",
    ),
    "falling knots": (lambda c, t: swap_knots(t), "radius_target_knots must start at 0 or above and never decrease"),
    "negative knot": (set_value("radius_target_knots", (0, 0), -0.1), "radius_target_knots must start at 0"),
    "zero source knot": (set_value("radius_source_knots", (1, 0), 0.0), "radius_source_knots must be positive"),
    "two scales": (lambda c, t: t.update(complement_scale=torch.ones(2).double()), r"complement_scale has shape \[2\]"),
    "negative scale": (set_value("complement_scale", (0,), -1.0), "complement_scale must not be negative"),
    "skewed basis": (set_value("basis", (0, 0), 3.0), "basis is not orthonormal"),
    "not a number": (set_value("target_mean", (2,), float("nan")), "target_mean has 1 non-finite values"),
    "infinite": (set_value("output_mean", (0,), float("inf")), "output_mean has 1 non-finite values"),
    "empty array": (lambda c, t: t.update(complement_scale=torch.zeros(0).double()), "complement_scale has shape"),
    "a changed value": (set_value("source_mean", (0,), 0.25), "fingerprint does not match"),
    "a dropped calibration": (lambda c, t: t.pop("output_mean"), "fingerprint does not match"),
    "a changed calibration": (lambda c, t: put(c, "options.calibration", "corpus"), "fingerprint does not match"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_artefact_is_refused(case: str, artefact: Path, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    config = json.loads((artefact / "config.json").read_text())
    tensors = load_file(artefact / "model.safetensors")
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=message) as caught:
        aniso.load_aligner(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "holds no config.json: name a folder that save_pretrained"),
        ("config.json", b'{"format": ', "config.json is not JSON"),
        ("config.json", b"\xff\xfe", "config.json is not JSON"),
        ("config.json", b"[]", "format is not 'aniso_ext.aligner'"),
        ("model.safetensors", None, "holds no model.safetensors: copy both files"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", b"\x80\x04pickle", "model.safetensors is damaged"),
    ],
)
def test_a_damaged_file_is_refused(
    name: str, content: bytes | None, message: str, artefact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artefact, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message) as caught:
        aniso.load_aligner(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_model_is_refused(kept: float, artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ArtefactError, match=r"model\.safetensors is damaged"):
        aniso.load_aligner(tmp_path)


def test_a_class_loads_only_its_own_method(artefact: Path) -> None:
    assert isinstance(aniso.AnisoAlign.from_pretrained(artefact), aniso.AnisoAlign)
    with pytest.raises(ArtefactError, match="method is 'anisoalign', which ReAlign cannot load: use load_aligner"):
        aniso.align.ReAlign.from_pretrained(artefact)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nowhere holds no config\.json"):
        aniso.load_aligner(tmp_path / "nowhere")


def test_saving_replaces_and_leaves_nothing_beside(artefact: Path, tmp_path: Path) -> None:
    aniso.make_aligner("mean_shift").fit(np.eye(4), -np.eye(4)).save_pretrained(tmp_path)
    first = aniso.load_aligner(artefact)
    first.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert aniso.load_aligner(tmp_path).fingerprint() == first.fingerprint()


def test_a_loaded_aligner_does_not_hold_on_to_its_file(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path, dirs_exist_ok=True)
    aligner = aniso.load_aligner(tmp_path)
    before = aligner.fingerprint()
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\0" * size)
    assert aligner.fingerprint() == before
