"""The training machinery: samples, batches, the loop, resume, several processes, logs."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from aniso_ext.align.rows import open_rows
from aniso_ext.align.training import (
    RowSampler,
    TrainingLog,
    TrainingOptions,
    TrainingRows,
    UnpairedRows,
    generator_for,
    global_normal,
    train,
)
from aniso_ext.errors import AnisoError, DataError, InputError, TrainingError

OPTIONS = TrainingOptions(
    steps=24, batch_rows=16, learning_rate=0.02, warmup_steps=4, evaluate_every=6, patience=0, checkpoint_every=6
)


class Denoiser(nn.Module):
    """A small net with matrices and vectors, and one constant that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows) * self.fixed


def denoise(module: Denoiser, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    noise = global_normal(len(batch), 3, generator)
    loss = (module(batch + noise) - batch).square().mean()
    return loss, {"size": batch.square().mean()}


def rows_of(count: int = 200, name: str = "demo") -> TrainingRows:
    data = torch.from_numpy(np.random.default_rng(5).standard_normal((count, 3)) + 1).float()
    return TrainingRows.split(data, name=name, fingerprint="data", seed=0)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().reshape(-1) for value in module.parameters()])


class Stop(Exception):
    """Stands for whatever ends a process."""


def stop_at(step: int) -> Any:
    def progress(done: int, total: int, parts: Any) -> None:
        if done >= step:
            raise Stop

    return progress


@pytest.mark.parametrize(
    "name, value",
    [("steps", -1), ("batch_rows", 0), ("evaluate_every", 0), ("ema", 1.0), ("learning_rate", math.nan), ("seed", 0.5)],
)
def test_options_name_what_is_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        TrainingOptions(**{name: value})


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    options = TrainingOptions(steps=110, warmup_steps=10, learning_rate=2.0)
    assert [options.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert options.rate(60) == pytest.approx(1.0)
    assert options.rate(109) == pytest.approx(1 - math.cos(math.pi / 100), rel=1e-9)
    assert options.decay(0) == 0.1 and options.decay(10**6) == 0.999


def test_a_sample_does_not_depend_on_how_the_stream_is_cut() -> None:
    data = torch.arange(500.0)[:, None]
    samples = []
    for size in (1, 7, 500):
        sampler = RowSampler(500, 60, seed=3, name="target")
        for batch in data.split(size):
            sampler.take(batch)
        samples.append(sampler.rows())
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    assert len(samples[0].unique()) == 60


def test_every_row_is_equally_likely_to_be_sampled() -> None:
    # Inclusion counts over independent seeds are binomial(1500, 1/4); the chi-square over 40 rows, of which 39 are
    # free, is scaled by 1 - 1/4 as in sampling without replacement. 5 deviations of chi-square(39): 39 + 5 sqrt(78).
    counts: Counter[int] = Counter()
    for seed in range(1500):
        sampler = RowSampler(40, 10, seed=seed, name="rows")
        sampler.take(torch.arange(40.0)[:, None])
        counts.update(int(value) for value in sampler.rows().flatten())
    seen = np.array([counts[row] for row in range(40)])
    assert seen.sum() == 15000
    assert ((seen - 375) ** 2 / (375 * 0.75)).sum() * 39 / 40 < 39 + 5 * math.sqrt(78)


@pytest.mark.parametrize(
    "dtype, kept",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_rows_keep_their_dtype_and_are_split_once(dtype: torch.dtype, kept: torch.dtype) -> None:
    data = torch.arange(1000).to(dtype)[:, None]
    rows = TrainingRows.sample(open_rows(data, "target"), most=400, seed=0)
    assert rows.train.dtype == kept and rows.train.shape == (380, 1) and rows.held_out.shape == (20, 1)
    if dtype != torch.bfloat16:  # which cannot tell the larger integers apart
        assert len(torch.cat((rows.train, rows.held_out)).unique()) == 400


def test_an_epoch_shows_each_row_once_and_batches_are_a_function_of_seed_and_step() -> None:
    rows = rows_of(100)  # 95 to train on, 19 a batch: five batches an epoch
    epoch = torch.cat([rows.batch(step, 19, seed=1) for step in range(5)])
    assert torch.equal(epoch.unique(dim=0), rows.train.unique(dim=0)) and len(epoch.unique(dim=0)) == 95
    again = rows_of(100)
    assert torch.equal(again.batch(7, 19, seed=1), rows.batch(7, 19, seed=1))
    assert not torch.equal(again.batch(7, 19, seed=2), rows.batch(7, 19, seed=1))
    assert rows.batch(0, 300, seed=1).shape == (300, 3)  # more than there are: several epochs in one batch


def test_two_sides_are_drawn_independently_of_each_other() -> None:
    data = torch.arange(400.0)[:, None]
    sides = [TrainingRows.sample(open_rows(data, name), most=200, seed=0) for name in ("source", "target")]
    source, target = UnpairedRows(*sides).batch(0, 64, seed=0)
    assert not torch.equal(source, target)
    assert [len(part) for part in next(UnpairedRows(*sides).held_out_batches(8))] == [8, 8]
    with pytest.raises(InputError, match="both named 'source'"):
        UnpairedRows(sides[0], sides[0])


def test_one_row_is_too_few() -> None:
    with pytest.raises(InputError, match="target has 1 rows: training needs at least 2"):
        TrainingRows.sample(open_rows(torch.ones(1, 4), "target"))


def test_the_loop_is_adamw_with_averaged_weights() -> None:
    """Against the same steps spelled out with torch's optimiser."""
    module, rows = Denoiser(), rows_of()
    record = train(module, denoise, rows, replace(OPTIONS, evaluate_every=24), name="demo")
    twin = Denoiser()
    trained = [value for value in twin.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in trained if value.dim() > 1], "weight_decay": 0.01},
            {"params": [value for value in trained if value.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.0,
    )
    averages = [value.detach().clone() for value in trained]
    for step in range(24):
        optimizer.zero_grad()
        denoise(twin, rows.batch(step, 16, 0), generator_for(torch.device("cpu"), 0, 0, step))[0].backward()
        norm = math.sqrt(sum(float(value.grad.square().sum()) for value in trained))
        for value in trained:
            value.grad *= min(1.0, 1 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS.rate(step)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        averages = [decay * old + (1 - decay) * new.detach() for old, new in zip(averages, trained, strict=True)]
    got = [value.detach() for value in module.parameters() if value.requires_grad]
    # float32 rounding over 24 steps of size at most 0.02: AdamW divides by a root of second moments, no step amplifies
    for mine, theirs in zip(got, averages, strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    assert record.after["loss"] < record.before["loss"] and record.best_step == 24
    assert set(record.before) == {"loss", "size"} and torch.equal(module.fixed, torch.ones(3))
    assert {"demo_steps", "demo_loss_before", "demo_loss_after"} <= set(record.summary())


def test_a_broken_run_ends_as_an_unbroken_one_to_the_bit(tmp_path: Path) -> None:
    rows, options = rows_of(), replace(OPTIONS, steps=60)
    whole = Denoiser()
    first = train(whole, denoise, rows, options, name="demo", log=TrainingLog(tmp_path / "whole"))
    checkpoint, log = tmp_path / "state.pt", TrainingLog(tmp_path / "broken")
    with pytest.raises(Stop):
        train(
            Denoiser(), denoise, rows, options, name="demo", log=log, checkpoint=checkpoint, progress=stop_at(40)
        )
    with (tmp_path / "broken" / "demo.jsonl").open("a") as file:
        file.write('{"step": 39, "spl')  # a line that was being written
    resumed = Denoiser()
    second = train(resumed, denoise, rows, options, name="demo", log=log, checkpoint=checkpoint)
    assert torch.equal(weights(resumed), weights(whole)) and first == second
    files = [(tmp_path / kind / "demo.jsonl").read_text() for kind in ("whole", "broken")]
    assert files[0] == files[1]
    lines = [json.loads(line) for line in files[0].splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 61))
    assert [line["step"] for line in lines if line["split"] == "held_out"] == list(range(0, 61, 6))
    # a finished run is not trained again, and gives the same weights
    finished = Denoiser()
    assert train(finished, denoise, rows, options, name="demo", checkpoint=checkpoint, progress=stop_at(0)) == first
    assert torch.equal(weights(finished), weights(whole))
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["state.pt"]


@pytest.mark.parametrize("change", ["seed", "data", "identity", "stage"])
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "state.pt"
    train(Denoiser(), denoise, rows_of(), OPTIONS, name="demo", checkpoint=path, identity={"weight": 1.0})
    options = replace(OPTIONS, seed=1) if change == "seed" else OPTIONS
    rows = rows_of(199) if change == "data" else rows_of()
    name = "other" if change == "stage" else "demo"
    with pytest.raises(DataError, match=rf"is of another run .*{'weight' if change == 'identity' else change}"):
        train(
            Denoiser(),
            denoise,
            rows,
            options,
            name=name,
            checkpoint=path,
            identity={"weight": 2.0 if change == "identity" else 1.0},
        )


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    train(Denoiser(), denoise, rows_of(), OPTIONS, name="demo", checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        train(Denoiser(), denoise, rows_of(), OPTIONS, name="demo", checkpoint=path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(DataError, match="is no checkpoint of this version"):
        train(Denoiser(), denoise, rows_of(), OPTIONS, name="demo", checkpoint=path)


def test_a_loss_that_is_not_finite_names_stage_part_and_step() -> None:
    data = torch.ones(40, 3)
    data[7] = math.nan
    rows = TrainingRows.split(data, name="demo", fingerprint="data", seed=0)
    with pytest.raises(TrainingError, match=r"demo: the (held-out )?loss is nan after"):
        train(Denoiser(), denoise, rows, OPTIONS, name="demo")

    def diverges(module: Denoiser, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        loss, _ = denoise(module, batch, generator)
        return loss, {"ratio": loss / 0 if torch.is_grad_enabled() else loss}

    with pytest.raises(TrainingError, match="demo: the ratio is inf after 1 of 24 steps"):
        train(Denoiser(), diverges, rows_of(), OPTIONS, name="demo")


def test_training_stops_when_patience_runs_out_and_keeps_the_best() -> None:
    def size(module: Denoiser, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        return torch.stack([value.square().sum() for value in module.net.parameters()]).sum(), {}

    module = Denoiser()
    start = weights(module).clone()
    record = train(module, denoise, rows_of(), replace(OPTIONS, patience=2), name="demo", held_out_loss=_rising())
    assert record.stopped_early and record.steps == 12 and record.best_step == 0
    assert torch.equal(weights(module), start)
    shrunk = train(module, size, rows_of(), replace(OPTIONS, patience=2), name="demo")
    assert not shrunk.stopped_early and shrunk.best_step == 24


def _rising() -> Any:
    calls = [0.0]

    def loss(module: nn.Module, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        calls[0] += 1
        return torch.tensor(calls[0]), {}

    return loss


def test_no_steps_measure_the_start_only() -> None:
    module = Denoiser()
    start = weights(module).clone()
    record = train(module, denoise, rows_of(), replace(OPTIONS, steps=0), name="demo")
    assert record.steps == 0 and record.before == record.after and torch.equal(weights(module), start)


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'aniso_ext\[tensorboard\]'"):
        TrainingLog(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard" / "demo") and purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def close(self) -> None:
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(Denoiser(), denoise, rows_of(), OPTIONS, name="demo", log=TrainingLog(tmp_path, tensorboard=True))
    lines = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    wanted = [(f"{line['split']}/{key}", line[key], line["step"]) for line in lines for key in ("loss", "size")]
    assert scalars == wanted


def _worker(rank: int, processes: int, folder: str, batch_rows: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    module = Denoiser()
    if rank == 1:
        with torch.no_grad():
            module.net[0].weight.add_(1.0)  # the start of process 0 is everyone's
    options = replace(OPTIONS, batch_rows=batch_rows)
    try:
        record = train(
            module,
            denoise,
            rows_of(),
            options,
            name="demo",
            log=TrainingLog(folder),
            checkpoint=f"{folder}/state.pt" if batch_rows % 2 == 0 else None,
        )
        torch.save({"weights": weights(module), "after": record.after}, f"{folder}/rank{rank}.pt")
    except AnisoError as error:
        Path(folder, f"error{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(2, str(tmp_path), 16), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    module = Denoiser()
    record = train(module, denoise, rows_of(), OPTIONS, name="demo")
    # means of two halves round differently from one mean: 24 steps of at most 0.02, as in the AdamW test
    assert (ranks[0]["weights"] - weights(module)).abs().max() < 1e-5
    assert ranks[0]["after"]["loss"] == pytest.approx(record.after["loss"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert len(lines) == 24 + 5  # process 1 writes nothing


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(2, str(tmp_path), 15), nprocs=2)
    assert (tmp_path / "error0").read_text() == "batch_rows 15 must be a multiple of the 2 processes"
