"""Arms of a comparison as data, and the choice among those that are reported as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.arms import ARMS, LadderData, choose_arms, read_ladder, run_ladder


def result(folder: Path, arm: str, seed: int, test: float, validation: float | None, tuned: str | None) -> None:
    place = folder / arm / f"seed-{seed}"
    place.mkdir(parents=True)
    found = {"arm": arm, "tuned": tuned, "seed": seed, "scores": {"attribute": {"value": test}}}
    if validation is not None:
        found["validation"] = {"attribute": {"value": validation}}
    (place / "result.json").write_text(json.dumps(found))


def test_every_method_gets_levels_of_noise_under_its_own_name() -> None:
    arms = {arm.name: arm for arm in choose_arms(None, noise="each")}
    assert choose_arms(["all"]) == choose_arms(None) == list(ARMS.values())
    for method in ("mean_shift", "realign", "initialisation", "anisoalign", "anisoalign-tuned"):
        levels = [arm for arm in arms.values() if arm.tuned == method]
        assert [arm.noise_std for arm in levels] == [0.0, 0.01, 0.02, 0.04]
        # all share one fitted aligner: noise is no reason to fit again
        assert {arm.aligner for arm in levels} == {ARMS[method].aligner}
        assert {arm.train_refiner for arm in levels} == {ARMS[method].train_refiner}
    # C3 has noise of its own, .02 unless told otherwise; more on top of it would be another method
    assert {arm.options.get("noise_std") for arm in arms.values() if arm.tuned == "c3_paper"} == {None, 0.01, 0.04}
    assert {arm.noise_std for arm in arms.values() if arm.tuned == "c3_paper"} == {0.0}
    for name in ("blind", "identity", "images"):
        assert arms[name] == ARMS[name]
    assert [arm.name for arm in choose_arms(["noise"], noise="each")] == [arm.name for arm in choose_arms(["noise"])]
    with pytest.raises(InputError, match="unknown arm 'best'"):
        choose_arms(["all", "best"])
    with pytest.raises(InputError, match="noise must be 'each'"):
        choose_arms(None, noise="some")


def test_a_group_is_its_best_arm_by_validation_whatever_the_test_says(tmp_path: Path) -> None:
    # level 0 was run before there were other levels: its result knows of no group
    for seed in (0, 1):
        result(tmp_path, "realign", seed, test=0.9, validation=0.5, tuned=None)
        result(tmp_path, "realign-0.02", seed, test=0.6, validation=0.7, tuned="realign")
        result(tmp_path, "identity", seed, test=0.1, validation=None, tuned=None)
    # better, but at the seed that the others do not have
    result(tmp_path, "realign-0.04", 0, test=0.95, validation=0.6, tuned="realign")
    result(tmp_path, "realign-0.04", 2, test=0.95, validation=0.99, tuned="realign")
    found = read_ladder(tmp_path, ["identity", "realign", "realign-0.02", "realign-0.04"])
    assert found.chosen == {"realign": "realign-0.02"}
    assert found.scores["realign"]["attribute"] == [0.6, 0.6]
    assert "realign (realign-0.02)" in found.table()
    alone = read_ladder(tmp_path, ["identity", "realign"])
    assert alone.chosen == {} and alone.scores["realign"]["attribute"] == [0.9, 0.9]


def test_a_choice_needs_validation_questions(tmp_path: Path) -> None:
    result(tmp_path, "noise-0.01", 0, test=0.9, validation=None, tuned="noise")
    result(tmp_path, "noise-0.02", 0, test=0.9, validation=None, tuned="noise")
    with pytest.raises(DataError, match="validation questions"):
        read_ladder(tmp_path)
    # and before hours of training are spent
    data = LadderData("a", "b", "c", "d", "e", "f", "g")
    with pytest.raises(InputError, match="2 arms are reported as 1"):
        run_ladder(data, choose_arms(["noise"])[:2], output=tmp_path / "new")
