"""Statistics of a fit that several processes make together: the same on all of them, and what one process finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from aniso_ext.align import Aligner, list_aligners, make_aligner
from aniso_ext.align.processes import gather
from aniso_ext.align.refiner import RefinementOptions
from aniso_ext.align.rows import open_rows
from aniso_ext.align.training import TrainingOptions, TrainingRows
from aniso_ext.errors import InputError

WIDTH, PROCESSES = 12, 2
STEPS = TrainingOptions(steps=4, batch_rows=64, warmup_steps=1, evaluate_every=2, checkpoint_every=0, autocast=False)


def unit_rows(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = 0.3 * (seed + 1) + rng.standard_normal((rows, WIDTH)) * np.linspace(1, 0.3, WIDTH)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


SOURCE, TARGET = unit_rows(9001, 0), unit_rows(8500, 1)  # batches of 8192 end elsewhere in halves of the rows


def aligner_for(method: str) -> Aligner:
    options: dict[str, Any] = {}
    if method == "anisoalign":
        options = {"rank": 6, "knots": 64, "calibration_steps": 1, "refine": False}
    return make_aligner(method, **options)


def refined_aligner() -> Aligner:
    # the V-side objective sorts the rows of each process apart, so that two processes train another refiner with it
    options = RefinementOptions(complement_weight=0)
    return make_aligner("anisoalign", rank=6, refinement=options, prior_training=STEPS, refinement_training=STEPS)


def write_shards(folder: Path) -> Path:
    folder.mkdir()
    for number, part in enumerate(np.split(SOURCE, [100, 101, 6000])):
        np.save(folder / f"{number}.npy", part)
    return folder


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    found = {method: aligner_for(method).fit(SOURCE, TARGET)._arrays() for method in list_aligners()}
    found["files"] = aligner_for("anisoalign").fit(f"{folder}/source", TARGET)._arrays()
    refined = refined_aligner().fit(SOURCE, TARGET)
    found["refined"] = refined._arrays()
    numbers = {name: value for name, value in refined.summary_.items() if isinstance(value, float)}
    found["summary"] = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    rows = open_rows(TARGET, "target").shared()
    found["sample"] = {"train": TrainingRows.sample(rows, most=500, seed=3).train}
    with pytest.raises(InputError, match="short has 1 rows for 2 processes: start fewer of them"):
        open_rows(TARGET[:1], "short").shared()
    broken = TARGET.copy()
    broken[-1] = np.nan
    with pytest.raises(InputError, match=r"target has 1 non-finite rows .* the first is row 8499"):
        aligner_for("realign").fit(SOURCE, broken)
    found["uneven"] = {"gathered": torch.cat(gather(torch.full((rank, 3), 7, dtype=torch.bfloat16)))}
    if rank == 0:  # a process may transform alone, a corpus mean included
        alone = make_aligner("realign")
        alone._install(found["realign"], WIDTH)
        alone.transform(SOURCE, calibration="corpus")
    streamed = torch.cat(list(rows.batches(1000)))
    torch.save({"found": found, "streamed": streamed}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    write_shards(folder / "source")
    mp.spawn(_worker, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_all_processes_hold_the_same_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["found"] for rank in ranks)
    for method, arrays in first.items():
        assert arrays.keys() == second[method].keys()
        assert all(torch.equal(value, second[method][name]) for name, value in arrays.items()), method


@pytest.mark.parametrize("method", list_aligners())
def test_two_processes_fit_what_one_fits(ranks: list[dict[str, Any]], method: str) -> None:
    alone = aligner_for(method).fit(SOURCE, TARGET)._arrays()
    together = ranks[0]["found"][method]
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        # Sums of 1e4 float64 numbers of unit size, then eigenvectors and roots, which divide by gaps of 1e-2 and more.
        assert float((together[name] - value).abs().max()) <= 1e4 * np.finfo(np.float64).eps, name


def test_shards_are_cut_anywhere(ranks: list[dict[str, Any]]) -> None:
    from_memory, from_files = (ranks[0]["found"][name] for name in ("anisoalign", "files"))
    for name, value in from_memory.items():
        assert float((from_files[name] - value).abs().max()) <= 1e4 * np.finfo(np.float64).eps, name


def test_each_process_streams_its_share_alone(ranks: list[dict[str, Any]]) -> None:
    shares = [rank["streamed"].numpy() for rank in ranks]
    assert [len(share) for share in shares] == [4250, 4250]
    assert np.array_equal(np.concatenate(shares), TARGET)


def test_the_sample_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = TrainingRows.sample(open_rows(TARGET, "target"), most=500, seed=3)
    assert torch.equal(ranks[0]["found"]["sample"]["train"], alone.train)


def test_the_survey_of_the_bounds_sees_all_rows(ranks: list[dict[str, Any]]) -> None:
    alone = refined_aligner().fit(SOURCE, TARGET)
    together = ranks[0]["found"]["summary"]
    for name in ("eps_eff_mean", "eps_eff_largest", "phase_concentration_initial", "prior_resultant_mean"):
        # float32 gradients of two halves round differently: 4 steps of 1e-3, as in the tests of training
        assert float(together[name]) == pytest.approx(alone.summary_[name], rel=1e-4), name


def test_tensors_of_other_lengths_are_gathered(ranks: list[dict[str, Any]]) -> None:
    gathered = ranks[0]["found"]["uneven"]["gathered"]
    assert gathered.dtype == torch.bfloat16
    assert gathered.tolist() == [[7.0, 7.0, 7.0]]  # process 0 had none
