"""AnisoAlign with refinement, end to end: what is trained, saved, resumed and transformed, and what bad input does."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import aniso_ext as aniso
from aniso_ext import ops
from aniso_ext.align import PriorOptions, RefinementOptions, TrainingOptions
from aniso_ext.align.prior import PhasePrior
from aniso_ext.align.refiner import Refiner, fit_refiner
from aniso_ext.align.refiner.fitting import complement_trace, state_moments
from aniso_ext.align.refiner.objective import Objective
from aniso_ext.align.refiner.passes import Passes
from aniso_ext.align.rows import open_rows
from aniso_ext.align.training import TrainingRows, UnpairedRows
from aniso_ext.align.training.loop import TrainingRun
from aniso_ext.errors import ArtefactError, DataError, InputError

WIDTH, RANK = 24, 8
VERSION_1 = Path(__file__).parent / "artefacts" / "version_1"
SMALL: dict[str, Any] = {
    "rank": RANK,
    "knots": 64,
    "prior": PriorOptions(width=24, blocks=1),
    "prior_training": TrainingOptions(steps=40, batch_rows=64, warmup_steps=5, evaluate_every=10),
    "refinement": RefinementOptions(a_theta=0.2, a_v=0.1),
    "refinement_training": TrainingOptions(
        steps=60, batch_rows=128, learning_rate=5e-3, warmup_steps=5, evaluate_every=10, ema=0.8
    ),
}
# The rounding of float32 weights and of the products of a row in another order.
SINGLE = 64 * 2.0**-24


def unit_rows(count: int, seed: int) -> np.ndarray:
    """Anisotropic unit rows off the origin; those of seed 2 have phases that gather and two lumps in the complement."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, WIDTH)) * np.geomspace(1, 0.1, WIDTH)
    if seed == 2:
        rows[:, :2] += 1.5
        rows[:, RANK:] = 0.3 * np.sign(rows[:, RANK:]) + 0.3 * rows[:, RANK:]
    rows = rows @ np.linalg.qr(np.random.default_rng(99).standard_normal((WIDTH, WIDTH)))[0]
    return oracle.unit(rows + 0.4 * np.eye(WIDTH)[seed] * WIDTH**0.5)


SOURCE, TARGET = unit_rows(900, 1), unit_rows(800, 2)


def make(**options: Any) -> aniso.AnisoAlign:
    return aniso.AnisoAlign(**{**SMALL, **options})


@pytest.fixture(scope="module", params=[False, True], ids=["default", "literal"])
def fitted(request: pytest.FixtureRequest) -> aniso.AnisoAlign:
    return make(literal=request.param).fit(SOURCE, TARGET)


@pytest.fixture(scope="module")
def refined() -> aniso.AnisoAlign:
    return make().fit(SOURCE, TARGET)


# What transform computes


def expected_rows(aligner: aniso.AnisoAlign, rows: np.ndarray) -> np.ndarray:
    """Encode, the network layer by layer and decode in NumPy, from the arrays of the artefact alone."""
    arrays = {name: value.double().numpy() for name, value in aligner._arrays().items()}
    complement = "diagonal" if aligner.literal else aligner.complement
    state = oracle.encode(rows, arrays, complement)
    gelu = np.vectorize(lambda x: float(torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64))))
    hidden = (state - arrays["refiner.input_mean"]) / arrays["refiner.input_std"]
    hidden = gelu(hidden @ arrays["refiner.first.weight"].T + arrays["refiner.first.bias"])
    hidden = hidden + gelu(hidden @ arrays["refiner.hidden.0.weight"].T + arrays["refiner.hidden.0.bias"])
    deltas = hidden @ arrays["refiner.last.weight"].T + arrays["refiner.last.bias"]
    a_theta, a_rho, a_v = arrays["refiner.bounds"]
    options = {"a_theta": a_theta, "a_rho": a_rho, "a_v": a_v, "literal": bool(arrays["refiner.projects_first"][0])}
    return oracle.decode(state, deltas, arrays, **options)


def test_transform_is_recomputed_from_the_arrays(fitted: aniso.AnisoAlign) -> None:
    rows = unit_rows(40, 1)
    calibrated = fitted.calibrate_on(SOURCE)
    expected = expected_rows(calibrated, rows)
    assert np.abs(calibrated.transform(rows) - expected).max() <= 1e-9
    assert np.abs(calibrated.transform(rows.astype(np.float32)) - expected).max() <= SINGLE
    half = torch.from_numpy(rows).bfloat16()
    exact = torch.from_numpy(expected_rows(calibrated, half.double().numpy()))
    result = calibrated.transform(half)
    assert result.dtype == torch.bfloat16
    # rounded once at the end: half a unit of bfloat16 in each coordinate
    assert float((result.double() - exact).abs().max()) <= 2.0**-9


def test_the_refinement_moves_rows_and_keeps_its_promises(fitted: aniso.AnisoAlign) -> None:
    assert fitted.refiner_ is not None and fitted.refiner_.literal is fitted.literal
    before = fitted.transform(SOURCE, calibration=None, refine=False)
    after = fitted.transform(SOURCE, calibration=None)
    moved = np.linalg.norm(after - before, axis=1)
    assert moved.min() > 1e-6 and np.median(moved) > 1e-3
    record = fitted.summary_
    assert moved.max() <= 2 * record["eps_eff_largest"] / (2 - record["eps_eff_largest"]) + 1e-6
    change = np.abs(after @ after.T - before @ before.T).max()
    assert change <= record["similarity_guarantee"] + 1e-6
    assert record["eps_eff_mean"] <= record["eps_eff_largest"] and record["eps_eff_median"] <= record["eps_eff_p99"]
    assert record["refiner_loss_after"] < record["refiner_loss_before"]
    assert record["refiner_score_after"] < record["refiner_score_before"]
    assert ("refiner_complement_before" in record) is not fitted.literal


def test_literal_leaves_the_complement_alone() -> None:
    # as printed, nothing trains dv: its last layer keeps the zero it starts from (METHOD D15)
    literal = make(literal=True).fit(SOURCE, TARGET)
    assert float(literal.refiner_.last.weight[RANK:].abs().max()) == 0
    default = make().fit(SOURCE, TARGET)
    assert float(default.refiner_.last.weight[RANK:].abs().max()) > 0


def test_calibration_is_that_of_the_refined_rows(refined: aniso.AnisoAlign) -> None:
    bare = refined.transform(SOURCE, calibration=None)
    assert np.abs(refined.frame_.output_mean.numpy() - bare.mean(0)).max() <= 1e-13
    assert np.abs(refined.transform(SOURCE) - oracle.unit(bare - bare.mean(0) + TARGET.mean(0))).max() <= 1e-13
    after = np.linalg.norm(refined.transform(SOURCE).mean(0) - TARGET.mean(0))
    assert refined.summary_["calibration_error_after"] == pytest.approx(after, abs=1e-12)
    corpus = unit_rows(300, 1)
    at_once = refined.transform(corpus, calibration="corpus")
    twin = refined.calibrate_on(corpus)
    assert np.abs(np.concatenate([twin.transform(part) for part in np.split(corpus, [3, 70])]) - at_once).max() <= 1e-13
    bare = refined.transform(corpus, calibration=None)
    assert np.abs(at_once - oracle.unit(bare - bare.mean(0) + TARGET.mean(0))).max() <= 1e-13


def test_the_closed_form_inside_is_that_of_a_fit_without_refinement(fitted: aniso.AnisoAlign) -> None:
    plain = make(literal=fitted.literal, refine=False).fit(SOURCE, TARGET)
    inside = fitted.closed_form()
    assert inside.fingerprint() == plain.fingerprint() != fitted.fingerprint()
    assert inside.refiner_ is None and plain.closed_form() is plain
    rows = unit_rows(50, 1)
    for calibration in ("auto", "corpus", None):
        unrefined = fitted.transform(rows, calibration=calibration, refine=False)
        assert np.array_equal(unrefined, plain.transform(rows, calibration=calibration))
        assert np.array_equal(unrefined, inside.transform(rows, calibration=calibration))
        assert np.array_equal(plain.transform(rows, calibration=calibration, refine=False), unrefined)
    with pytest.raises(InputError, match="took its mean from a corpus: call closed_form"):
        fitted.calibrate_on(rows).closed_form()


@pytest.mark.parametrize("literal", [False, True])
def test_without_an_objective_the_refined_rows_are_the_closed_form(literal: bool) -> None:
    off = RefinementOptions(score_weight=0, consistency_weight=0, complement_weight=0)
    aligner = make(refinement=off, literal=literal).fit(SOURCE, TARGET)
    assert aligner.summary_["refiner_steps"] == 0
    assert aligner.summary_["phase_concentration_refined"] == aligner.summary_["phase_concentration_initial"]
    difference = aligner.transform(SOURCE) - aligner.transform(SOURCE, refine=False)
    assert np.abs(difference).max() <= 16 * 2.0**-52


@pytest.mark.parametrize("name", ["score", "consistency", "complement"])
def test_each_objective_can_be_switched_off(name: str) -> None:
    aligner = make(refinement=RefinementOptions(**{f"{name}_weight": 0.0})).fit(SOURCE, TARGET)
    parts = {part for part in ("score", "consistency", "complement") if f"refiner_{part}_before" in aligner.summary_}
    assert parts == {"score", "consistency", "complement"} - {name}


# The objective


@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
def test_objective_is_the_weighted_sum_of_its_parts(literal: bool, fitted: aniso.AnisoAlign) -> None:
    frame, prior = fitted.frame_.with_output_mean(None), fitted.prior_
    options = RefinementOptions(score_weight=0.7, consistency_weight=3.0, complement_weight=0.4)
    objective = Objective(frame, prior, options, trace=0.5, literal=literal, backend="auto")
    batch = torch.from_numpy(SOURCE[:64]).float(), torch.from_numpy(TARGET[:64]).float()
    total, parts = objective(fitted.refiner_, batch, torch.Generator().manual_seed(0))
    weights = {"score": 0.7, "consistency": 3.0, "complement": 0.4}
    assert set(parts) == set(weights) - ({"complement"} if literal else set()) | {"concentration"}
    expected = sum(weights[name] * float(value) for name, value in parts.items() if name in weights)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    again = objective(fitted.refiner_, batch, torch.Generator().manual_seed(0))[1]
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    # L_II is the prior's own objective at theta^, conditioned on log rho^ and divided by the blocks
    state = ops.encode(batch[0], frame)
    deltas = fitted.refiner_(state)
    blocks = RANK // 2
    theta = torch.atan2(state[:, :blocks], state[:, blocks:RANK]) + 0.2 * deltas[:, :blocks].tanh()
    log_radius = state[:, RANK : RANK + blocks] + 0.1 * deltas[:, blocks:RANK].tanh()
    generator = torch.Generator().manual_seed(0)
    if not literal:
        torch.randn(WIDTH, 64, generator=generator)  # the directions are drawn first
    score = float(prior.loss(theta, log_radius, generator)) / blocks
    assert float(parts["score"]) == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize(("chunk_rows", "polar_rows"), [(1, 1), (13, 64), (32, 7), (64, 64), (100, 20)])
@pytest.mark.parametrize(
    "weights", [{}, {"score_weight": 0}, {"consistency_weight": 0}, {"complement_weight": 0}, "literal"]
)
def test_gradients_that_come_with_the_loss_are_those_of_autograd(
    chunk_rows: int, polar_rows: int, weights: Any, fitted: aniso.AnisoAlign
) -> None:
    literal = weights == "literal"
    options = RefinementOptions(**({"consistency_weight": 3.0} | ({} if literal else weights)))
    batch = torch.from_numpy(SOURCE[:64]).float(), torch.from_numpy(TARGET[:64]).float()
    found = []
    for sizes in ({}, {"chunk_rows": chunk_rows, "polar_rows": polar_rows, "written_out": True}):
        objective = Objective(
            fitted.frame_, fitted.prior_, options, trace=0.5, literal=literal, backend="auto", **sizes
        )
        refiner = copy.deepcopy(fitted.refiner_).requires_grad_(True)
        total, parts = objective(refiner, batch, torch.Generator().manual_seed(0))
        total.backward()
        gradients = [parameter.grad for parameter in refiner.parameters()]
        with torch.no_grad():
            held_out = objective(refiner, batch, torch.Generator().manual_seed(0))[0]
        found.append(({"loss": total.detach(), "held out": held_out, **parts}, gradients))
    (whole, expected), (chunked, gradients) = found
    assert set(whole) == set(chunked)
    for name, value in whole.items():
        # sums of float32 in another order; what is subtracted in them is of order 1
        assert float(chunked[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [64, 20], ids=["at once", "in chunks"])
def test_narrow_gradients_are_as_exact_as_those_of_autocast(
    chunk_rows: int, dtype: torch.dtype, refined: aniso.AnisoAlign
) -> None:
    rows = torch.from_numpy(SOURCE[:64]).to(dtype), torch.from_numpy(TARGET[:64]).to(dtype)
    found = {}
    for name, autocast, written_out in (("exact", False, False), ("autocast", True, False), ("written", True, True)):
        objective = Objective(
            refined.frame_,
            refined.prior_,
            RefinementOptions(),
            trace=0.5,
            literal=False,
            backend="auto",
            chunk_rows=chunk_rows,
            written_out=written_out,
        )
        refiner = copy.deepcopy(refined.refiner_).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            generator = torch.Generator().manual_seed(0)
            total, _, gradients = objective.with_gradients(refiner, lambda: rows, generator)
        if gradients is None:
            gradients = list(torch.autograd.grad(total, list(refiner.parameters())))
        else:
            narrow = torch.bfloat16 if chunk_rows == 64 else torch.float32
            assert {value.dtype for value in gradients if value.dim() == 2} == {narrow}
        found[name] = [total.detach(), *gradients]
    for mine, theirs, wanted in zip(found["written"], found["autocast"], found["exact"], strict=True):
        error, allowed = (float((one.float() - wanted).norm()) for one in (mine, theirs))
        # the state is rounded, too: twice what autocast loses, and a unit of bfloat16 where that is nothing
        assert error <= max(2 * allowed, 2.0**-8 * float(wanted.norm()))


def test_a_batch_is_given_back_before_the_passes(refined: aniso.AnisoAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def take() -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.from_numpy(SOURCE[:64]).float(), torch.from_numpy(TARGET[:64]).float()
        held.extend(map(weakref.ref, batch))
        return batch

    forward = Passes.forward

    def checked(passes: Passes, rows: torch.Tensor) -> Any:
        assert [reference() for reference in held] == [None, None]
        return forward(passes, rows)

    monkeypatch.setattr(Passes, "forward", checked)
    objective = Objective(
        refined.frame_, refined.prior_, RefinementOptions(), trace=0.5, literal=False, backend="auto", written_out=True
    )
    refiner = copy.deepcopy(refined.refiner_).requires_grad_(True)
    assert objective.with_gradients(refiner, take, torch.Generator().manual_seed(0))[2] and len(held) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_rows", [128, 48], ids=["at once", "in chunks"])
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_recorded_on_a_gpu_are_the_steps(chunk_rows: int, autocast: bool, fitted: aniso.AnisoAlign) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    frame, prior = fitted.frame_.with_output_mean(None).to(device=device), copy.deepcopy(fitted.prior_).to(device)
    options = TrainingOptions(steps=50, batch_rows=128, learning_rate=5e-3, warmup_steps=5, autocast=autocast)
    stored = np.float16 if autocast else np.float32
    rows = UnpairedRows(
        TrainingRows.sample(open_rows(SOURCE.astype(stored), "source"), device=device),
        TrainingRows.sample(open_rows(TARGET.astype(stored), "target"), device=device),
    )
    objective = Objective(
        frame, prior, RefinementOptions(), trace=0.5, literal=False, backend="auto", chunk_rows=chunk_rows
    )
    losses: list[list[dict[str, float]]] = []
    for records in (True, False):
        refiner = Refiner(RANK // 2, WIDTH, bounds=RefinementOptions().bounds(WIDTH)).to(device)
        run = TrainingRun(refiner, objective, rows, options, "refiner", objective, {}, None, None)
        if not records:
            run.runner.recorder = None
        losses.append([])
        for _ in range(options.steps):
            run.advance()
            losses[-1].append({name: float(value) for name, value in run._pending[-1][1].items()})
        assert run.runner.recorded == records
    # the same kernels on the same numbers; where libraries choose others, rounding that 50 steps may carry on
    for recorded, plain in zip(*losses, strict=True):
        assert recorded == pytest.approx(plain, rel=2.0**-8 if autocast else 1e-4, abs=1e-6)


def test_statistics_of_the_states_and_of_the_complement() -> None:
    frame = make(refine=False).fit(SOURCE, TARGET).frame_
    arrays = {name: value.numpy() for name, value in frame.tensors().items()}
    rows = torch.from_numpy(SOURCE).float()
    state = oracle.encode(rows.double().numpy(), arrays, "scalar")
    mean, std = state_moments(rows, frame)
    assert np.abs(mean.numpy() - state.mean(0)).max() <= 1e-6
    assert np.abs(std.numpy() - state.std(0)).max() <= 1e-6
    outside = (TARGET - TARGET.mean(0)) @ (np.eye(WIDTH) - arrays["basis"] @ arrays["basis"].T)
    trace = complement_trace(torch.from_numpy(TARGET), frame)
    assert trace == pytest.approx((outside**2).sum() / len(TARGET), rel=1e-10)


def test_only_the_refiner_learns(refined: aniso.AnisoAlign) -> None:
    tensors = {name: value.clone() for name, value in refined.prior_.tensors().items()}
    prior = PhasePrior.from_tensors(tensors)
    training = TrainingOptions(steps=5, batch_rows=32)
    fit_refiner(
        open_rows(SOURCE, "source"), open_rows(TARGET, "target"), refined.frame_, prior, RefinementOptions(), training
    )
    assert all(torch.equal(value, tensors[name]) for name, value in prior.tensors().items())


# Determinism, resume, records


def test_fits_are_a_function_of_data_options_and_seed(refined: aniso.AnisoAlign) -> None:
    state = torch.random.get_rng_state()
    again = make().fit(SOURCE.copy(), TARGET.copy())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.fingerprint() == refined.fingerprint()
    assert again.summary_ == refined.summary_
    assert make(seed=1).fit(SOURCE, TARGET).fingerprint() != refined.fingerprint()


class Killed(Exception):
    """What stops a fit in the middle."""


@pytest.mark.parametrize(("stage", "step"), [("prior", 20), ("refiner", 40)])
def test_a_killed_fit_resumes_to_the_bit(stage: str, step: int, refined: aniso.AnisoAlign, tmp_path: Path) -> None:
    options = {
        f"{name}_training": TrainingOptions(**{**vars(SMALL[f"{name}_training"]), "checkpoint_every": 10})
        for name in ("prior", "refinement")
    }
    seen: list[tuple[str, int, int]] = []

    def watch(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if (name, done) == (stage, step) and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed

    folders = {"checkpoint_dir": tmp_path / "state", "log_dir": tmp_path / "log"}
    with pytest.raises(Killed):
        make(**options).fit(SOURCE, TARGET, **folders, progress=watch)
    seen.clear()
    resumed = make(**options).fit(SOURCE, TARGET, **folders, progress=watch)
    # the last state was saved one interval before
    assert next(done for name, done, _ in seen if name == stage) == step
    assert resumed.fingerprint() == refined.fingerprint()
    assert resumed.summary_ == refined.summary_
    unbroken = tmp_path / "unbroken"
    make(**options).fit(SOURCE, TARGET, log_dir=unbroken)
    for name in ("prior", "refiner"):
        assert (tmp_path / "log" / f"{name}.jsonl").read_text() == (unbroken / f"{name}.jsonl").read_text()
    # a finished run is not trained again, and its state fits no other data or options
    seen.clear()
    make(**options).fit(SOURCE, TARGET, **folders, progress=watch)
    assert seen == []
    with pytest.raises(DataError, match="is of another run"):
        make(**options).fit(SOURCE[1:], TARGET, **folders)
    with pytest.raises(DataError, match=r"is of another run .*a_theta differ; a_theta was 0.2 and is 0.3"):
        make(**options, refinement=RefinementOptions(a_theta=0.3, a_v=0.1)).fit(SOURCE, TARGET, **folders)


def test_losses_are_written_step_by_step(tmp_path: Path) -> None:
    make().fit(SOURCE, TARGET, log_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prior.jsonl", "refiner.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "refiner.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 61))
    parts = {"step", "split", "loss", "score", "consistency", "complement", "concentration"}
    assert all(set(line) == parts for line in lines)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, weight in (("shared", 0.0), ("default", 1.0)):
        options = RefinementOptions(a_theta=0.2, a_v=0.1, complement_weight=weight)
        aligner = make(refinement=options).fit(SOURCE, TARGET, log_dir=f"{folder}/{name}")
        torch.save(aligner._arrays(), f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_fit_one_aligner(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    for name in ("shared", "default"):
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        assert ranks[0].keys() == ranks[1].keys()
        assert all(torch.equal(value, ranks[1][array]) for array, value in ranks[0].items()), name
    # the prior and the objectives that are means over rows train as in one process; the V-side objective sorts the rows
    # of each process apart, so it does not. Other roundings of a mean change a weight by less than one step of 5e-3.
    alone = make(refinement=RefinementOptions(a_theta=0.2, a_v=0.1, complement_weight=0)).fit(SOURCE, TARGET)
    shared = torch.load(tmp_path / "shared0.pt", weights_only=True)
    for array, value in alone._arrays().items():
        assert float((shared[array].double() - value.double()).abs().max()) <= 1e-3, array


# Artefacts


def test_an_artefact_restores_everything(fitted: aniso.AnisoAlign, tmp_path: Path) -> None:
    again = aniso.load_aligner(fitted.save_pretrained(tmp_path))
    assert again.get_params() == fitted.get_params()
    assert (again.fingerprint(), again.summary_) == (fitted.fingerprint(), fitted.summary_)
    rows = unit_rows(30, 1)
    for refine in (True, False):
        assert np.array_equal(again.transform(rows, refine=refine), fitted.transform(rows, refine=refine))
    assert again.closed_form().fingerprint() == fitted.closed_form().fingerprint()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 2
    assert config["options"]["prior_training"]["steps"] == 40
    assert config["options"]["refinement"]["a_theta"] == 0.2


def test_pickles_and_clones(fitted: aniso.AnisoAlign) -> None:
    fitted.transform(SOURCE[:3])
    again = pickle.loads(pickle.dumps(fitted))
    assert again.fingerprint() == fitted.fingerprint()
    assert np.array_equal(again.transform(SOURCE), fitted.transform(SOURCE))
    clone = type(fitted)(**fitted.get_params(deep=False))
    assert clone.get_params() == fitted.get_params() and not hasattr(clone, "refiner_")


def test_the_closed_form_artefact_of_version_1_still_loads_to_the_byte() -> None:
    aligner = aniso.load_aligner(VERSION_1)
    assert aligner.fingerprint() == json.loads((VERSION_1 / "config.json").read_text())["fingerprint"]
    assert aligner.refiner_ is None
    rows, expected = np.load(VERSION_1 / "source.npy"), np.load(VERSION_1 / "stand_ins.npy")
    result = aligner.transform(rows)
    frame = ops.Frame.from_tensors(load_file(VERSION_1 / "model.safetensors"))
    assert result.tobytes() == ops.correct(torch.from_numpy(rows), frame).numpy().tobytes()
    # other processors sum in another order
    assert np.abs(result - expected).max() <= 16 * 2.0**-52


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no first layer": (lambda t: t.pop("refiner.first.weight"), "refiner.first.weight is missing"),
    "no bounds": (lambda t: t.pop("refiner.bounds"), "refiner.bounds is missing"),
    "no order": (lambda t: t.pop("refiner.projects_first"), "refiner.projects_first is missing"),
    "no resultant": (lambda t: t.pop("prior.resultant"), "missing .'prior.resultant'"),
    "no graph": (lambda t: t.pop("prior.graph.anchor"), "anchor"),
    "narrow layer": (put("refiner.first.weight", lambda v: v[:, 1:]), "refiner.first.weight has shape"),
    "not a number": (put("refiner.last.bias", lambda v: v * float("nan")), "refiner.last.bias has .* non-finite"),
    "score not a number": (put("prior.network.input.bias", lambda v: v / 0), "prior.network.input.bias has .* non-fin"),
    "double weights": (put("refiner.hidden.0.weight", lambda v: v.double()), "hidden.0.weight is torch.float64"),
    "wide bounds": (put("refiner.bounds", lambda v: v + 100), "refiner.bounds: a_theta must be between 0 and 10"),
    "unknown part": (lambda t: t.update({"refiner.more": torch.ones(1)}), "unknown refiner.more"),
    "unknown mean": (lambda t: t.update({"closed_form.mean": torch.ones(1)}), "unknown array closed_form.mean"),
    "short mean": (put("closed_form.output_mean", lambda v: v[1:]), "closed_form.output_mean must be finite float64"),
    "a changed weight": (put("refiner.first.weight", lambda v: v + 1), "fingerprint does not match"),
    "a changed prior": (put("prior.network.input.bias", lambda v: v + 1), "fingerprint does not match"),
    "a changed bound": (put("refiner.bounds", lambda v: v * 2), "fingerprint does not match"),
    "no refiner": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("refiner.")],
        "refiner.bounds is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_parts_are_named(case: str, refined: aniso.AnisoAlign, tmp_path: Path) -> None:
    refined.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change, message = DAMAGES[case]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=message) as caught:
        aniso.load_aligner(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("refine", False, "refine is False, but closed_form.output_mean belongs to a refined aligner"),
        ("refinement", {"a_theta": -1}, "options.refinement: a_theta must be between 0 and 10, got -1"),
        ("refinement", {"a_thet": 1}, "options.refinement: .*a_thet"),
        ("refinement_training", {"steps": -1}, "options.refinement_training: steps must be an integer of at least 0"),
        ("prior", 3, "options: prior must be a PriorOptions or None, got 3"),
    ],
)
def test_damaged_options_are_named(
    option: str, value: object, message: str, refined: aniso.AnisoAlign, tmp_path: Path
) -> None:
    refined.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"][option] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=message):
        aniso.load_aligner(tmp_path)


def test_a_refined_artefact_is_copied_whole(refined: aniso.AnisoAlign, tmp_path: Path) -> None:
    folder = shutil.copytree(refined.save_pretrained(tmp_path / "one"), tmp_path / "two")
    assert aniso.load_aligner(folder).fingerprint() == refined.fingerprint()


# Files


def test_paths_stream_to_the_same_fit(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target.npy"
    source.mkdir()
    for number, part in enumerate(np.split(SOURCE.astype(np.float32), [90, 300])):
        np.save(source / f"part_{number}.npy", part)
    np.save(target, TARGET.astype(np.float32))
    streamed = make().fit(source, target)
    in_memory = make().fit(SOURCE.astype(np.float32), torch.from_numpy(TARGET).float())
    rows = SOURCE.astype(np.float32)
    # moments of other batches differ in the last bit, and training follows its start
    assert np.abs(streamed.transform(source) - in_memory.transform(rows)).max() <= 1e-4


def test_conversion_refines_what_transform_refines(refined: aniso.AnisoAlign, tmp_path: Path) -> None:
    rows = unit_rows(90, 1)
    np.save(tmp_path / "in.npy", rows)
    for calibration in ("fitted", "corpus"):
        out = tmp_path / f"{calibration}.npy"
        aniso.convert_embeddings(refined, tmp_path / "in.npy", out, batch_rows=40, calibration=calibration)
        assert np.abs(np.load(out) - refined.transform(rows, calibration=calibration)).max() <= 1e-13


# Bad and degenerate input


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.where(np.arange(900)[:, None] == 17, np.nan, SOURCE), TARGET, "source has 1 non-finite rows .*row 17"),
        (SOURCE, np.where(np.arange(800)[:, None] == 3, np.inf, TARGET), "target has 1 non-finite rows .*row 3"),
        (SOURCE[:, :7], TARGET, "source has width 7 and target 24"),
        (SOURCE[:5], TARGET[:4], "5 source and 4 target rows vary in at most 7 directions, the rank is 8"),
        (SOURCE[:1], TARGET, r"source is \[1, 24\]: fitting needs at least 2 rows"),
        (SOURCE[:1].repeat(9, 0), SOURCE[:1].repeat(9, 0), "all rows of each side are equal"),
    ],
    ids=["nan", "inf", "widths", "few rows", "one row", "constant"],
)
def test_bad_input_is_refused(source: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make().fit(source, target)


def degenerate(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "few rows":
        return SOURCE[:6], TARGET[:6]
    if name == "constant columns":
        source, target = SOURCE.copy(), TARGET.copy()
        source[:, 5:9], target[:, 5:9] = 0.2, 0.1
        return oracle.unit(source), oracle.unit(target)
    if name == "duplicated rows":
        return np.concatenate([SOURCE[:200], SOURCE[:1].repeat(200, 0)]), TARGET[:100].repeat(4, 0)
    if name == "source is target":
        return TARGET, TARGET
    if name == "one side constant":
        return SOURCE, TARGET[:1].repeat(50, 0)
    return SOURCE, TARGET


@pytest.mark.parametrize(
    "name",
    ["few rows", "constant columns", "duplicated rows", "source is target", "one side constant", "full rank"],
)
@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
def test_degenerate_input_gives_unit_rows_within_the_bounds(name: str, literal: bool) -> None:
    source, target = degenerate(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        aligner = make(rank=WIDTH if name == "full rank" else RANK, literal=literal).fit(source, target)
    after = aligner.transform(source, calibration=None)
    before = aligner.transform(source, calibration=None, refine=False)
    assert np.abs(np.linalg.norm(aligner.transform(source), axis=1) - 1).max() <= 1e-12
    eps = aligner.summary_["eps_eff_largest"]
    if eps < 1:
        assert np.linalg.norm(after - before, axis=1).max() <= 2 * eps / (2 - eps) + 1e-6
    if name == "source is target" and not literal:
        # the closed form is the identity up to its knots, so the refiner's bound is all that can move a row
        assert np.abs(before - source).max() <= 1e-3


def test_collapse_is_warned_of() -> None:
    # a bound wide enough to gather all phases, and nothing that holds them apart
    wide = RefinementOptions(a_theta=3.0, consistency_weight=0, complement_weight=0)
    training = TrainingOptions(steps=300, batch_rows=128, warmup_steps=5, learning_rate=1e-2, ema=0.9, patience=0)
    source = unit_rows(3000, 1)
    with pytest.warns(UserWarning, match="the refiner has concentrated the phases of .* beyond the target's"):
        aligner = make(refinement=wide, refinement_training=training).fit(source, TARGET)
    assert aligner.summary_["collapsed_blocks"] > 0
    assert aligner.summary_["phase_concentration_refined"] > aligner.summary_["phase_concentration_target"]
