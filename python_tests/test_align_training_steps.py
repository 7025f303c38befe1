"""Recorded training steps: what is replayed is what would have run; what cannot be recorded runs as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_align_training import OPTIONS, Denoiser, Stop, denoise, rows_of, stop_at, weights

from aniso_ext.align.training import TrainingLog, TrainingOptions, TrainingRows, UnpairedRows, loop, train
from aniso_ext.align.training.steps import WARM_UP_STEPS, recorder_for

# AdamW moves a weight by at most about the rate a step; the rates of recorded steps are float32.
RATE_ROUNDING = OPTIONS.steps * OPTIONS.learning_rate * 2.0**-20


class Replays:
    """Stands for CUDA graphs: recording a body leaves no trace, a replay computes it into the first output."""

    def __init__(self, touched: Callable[[], list[torch.Tensor]]) -> None:
        self.touched, self.count = touched, 0

    def record(
        self, body: Callable[[], torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        kept = [tensor.detach().clone() for tensor in self.touched()]
        output = body().zero_()
        with torch.no_grad():
            for tensor, value in zip(self.touched(), kept, strict=True):
                tensor.copy_(value)

        def replay() -> None:
            self.count += 1
            output.copy_(body())

        return output, replay


class Refuses:
    """Cannot record."""

    def record(self, body: Callable[[], torch.Tensor], generator: torch.Generator) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


class Run(loop.TrainingRun):
    """Of the denoiser, with a recorder of the test's choice."""

    def __init__(self, recorder: Any, batches: Any = None, loss: Any = denoise) -> None:
        super().__init__(Denoiser(), loss, batches or rows_of(), OPTIONS, "demo", loss, {}, None, None)
        self.runner.recorder = recorder(self) if callable(recorder) else recorder


def replays_of(run: loop.TrainingRun) -> Replays:
    def touched() -> list[torch.Tensor]:
        state = [value for values in run.optimizer.state.values() for value in values.values()]
        return [*run.parameters.values(), *run.average.values(), *state]

    return Replays(touched)


def test_replays_are_the_steps_that_would_have_run() -> None:
    plain, recorded = Run(None), Run(replays_of)
    first, second = plain.finish(), recorded.finish()
    assert recorded.runner.recorder.count == OPTIONS.steps - WARM_UP_STEPS
    assert (weights(plain.module) - weights(recorded.module)).abs().max() < RATE_ROUNDING
    assert second.best_step == first.best_step
    assert second.after == pytest.approx(first.after, rel=1e-5)
    # and not merely because nothing was learned
    assert (weights(plain.module) - weights(Denoiser())).abs().max() > 1000 * RATE_ROUNDING


def test_replays_write_the_losses_of_each_step(tmp_path: Path) -> None:
    lines = []
    for name, recorder in (("plain", None), ("recorded", replays_of)):
        run = Run(recorder)
        with TrainingLog(tmp_path / name).open("demo", 0) as run.log:
            run.finish()
        lines.append((tmp_path / name / "demo.jsonl").read_text().splitlines())
    plain, recorded = ([json.loads(line) for line in text] for text in lines)
    assert len(plain) == len(recorded) == OPTIONS.steps + 5
    for line, other in zip(plain, recorded, strict=True):
        assert line.pop("split") == other.pop("split")
        assert other == pytest.approx(line, rel=1e-5)


def test_a_batch_of_two_tensors_keeps_its_places() -> None:
    def distance(module: Denoiser, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        source, target = batch
        return (module(source) - target.mean(dim=0)).square().mean(), {}

    rows = UnpairedRows(rows_of(200, "source"), rows_of(150, "target"))
    plain, recorded = Run(None, rows, distance), Run(replays_of, rows, distance)
    plain.finish(), recorded.finish()
    assert recorded.runner.recorder.count == OPTIONS.steps - WARM_UP_STEPS
    assert (weights(plain.module) - weights(recorded.module)).abs().max() < RATE_ROUNDING


def test_a_batch_of_another_shape_is_not_replayed() -> None:
    class Changing:
        fingerprint = "changing"

        def __init__(self) -> None:
            self.rows = rows_of()
            self.held_out_batches = self.rows.held_out_batches

        def batch(self, step: int, batch_rows: int, seed: int) -> torch.Tensor:
            return self.rows.batch(step, batch_rows, seed)[: batch_rows - (step == 10)]

    plain, recorded = Run(None, Changing()), Run(replays_of, Changing())
    plain.finish(), recorded.finish()
    assert recorded.runner.recorder.count == OPTIONS.steps - WARM_UP_STEPS - 1
    assert (weights(plain.module) - weights(recorded.module)).abs().max() < RATE_ROUNDING


def test_what_cannot_be_recorded_runs_as_before_and_says_why() -> None:
    plain, refused = Run(None), Run(Refuses())
    plain.finish()
    with pytest.warns(UserWarning, match=r"demo: .* CUDA graph \(operation not permitted when stream is capturing\)"):
        refused.finish()
    assert not refused.runner.recorded
    assert torch.equal(weights(plain.module), weights(refused.module))


class Narrow:
    """The loss of the denoiser, whose gradients come along in bfloat16."""

    def __call__(self, module: Denoiser, batch: torch.Tensor, generator: torch.Generator) -> Any:
        return denoise(module, batch, generator)

    def with_gradients(self, module: Denoiser, take: Callable[[], torch.Tensor], generator: torch.Generator) -> Any:
        loss, parts = denoise(module, take(), generator)
        trained = [value for value in module.parameters() if value.requires_grad]
        return loss.detach(), parts, [grad.bfloat16() for grad in torch.autograd.grad(loss, trained)]


def rounded(module: Denoiser, batch: torch.Tensor, generator: torch.Generator) -> Any:
    """The same loss for autograd, with gradients that are rounded to bfloat16 on their way."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    copies = {name: value + 0 for name, value in trained.items()}
    for value in copies.values():
        if value.requires_grad:
            value.register_hook(lambda grad: grad.bfloat16().float())

    def call(rows: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, copies, (rows,))

    return denoise(call, batch, generator)


def test_narrow_gradients_step_as_wide_ones_do() -> None:
    plain, narrow = Run(None, loss=rounded), Run(None, loss=Narrow())
    first, second = plain.finish(), narrow.finish()
    # only the norm that clips them is summed in another order
    assert (weights(plain.module) - weights(narrow.module)).abs().max() < RATE_ROUNDING
    assert second.after == pytest.approx(first.after, rel=1e-5)
    assert (weights(plain.module) - weights(Denoiser())).abs().max() > 1000 * RATE_ROUNDING
    steps = {float(state["step"]) for state in narrow.optimizer.state.values()}
    assert steps == {OPTIONS.steps} and all(value.grad is None for value in narrow.module.parameters())


def test_no_more_than_the_largest_gradient_is_widened_at_a_time() -> None:
    body = Run(None).runner.body
    sizes = [parameter.numel() for parameter in body.parameters]
    groups = body._groups()
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in group) <= max(sizes) for group in groups)
    assert len(groups) < len(sizes)


def test_batches_gathered_in_the_step_are_the_batches() -> None:
    class Plain:
        """Rows that are gathered by the host's call alone."""

        def __init__(self) -> None:
            rows = rows_of()
            self.fingerprint, self.batch, self.held_out_batches = rows.fingerprint, rows.batch, rows.held_out_batches

    plain, gathered = Run(None, Plain()), Run(replays_of)
    assert plain.runner.body._gather is None and gathered.runner.body._gather is not None
    gathered.runner.recorder = None
    plain.finish(), gathered.finish()
    assert torch.equal(weights(plain.module), weights(gathered.module))


def test_the_cpu_records_nothing() -> None:
    assert recorder_for(torch.device("cpu")) is None


class Cuda:
    """Rows and module on the GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        rows = rows_of(400)
        self.rows = TrainingRows.split(
            torch.cat((rows.train, rows.held_out)).cuda(), name="demo", fingerprint="data", seed=0
        )
        self.options = TrainingOptions(
            steps=50, batch_rows=64, learning_rate=0.02, warmup_steps=4, evaluate_every=10, patience=0
        )

    def run(self, *, graphs: bool) -> tuple[torch.Tensor, list[float], bool]:
        run = loop.TrainingRun(
            Denoiser().cuda(), denoise, self.rows, self.options, "demo", denoise, {}, None, None
        )
        if not graphs:
            run.runner.recorder = None
        losses = []
        for _ in range(self.options.steps):
            run.advance()
            losses.append(float(run._pending[-1][1]["loss"]))
        return weights(run.module).cpu(), losses, run.runner.recorded


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_on_a_gpu_train_what_kernels_train(autocast: bool) -> None:
    cuda = Cuda()
    cuda.options = replace(cuda.options, autocast=autocast)
    plain, expected, _ = cuda.run(graphs=False)
    recorded, losses, used = cuda.run(graphs=True)
    assert used
    # the same kernels on the same numbers; the averages alone are made by another one
    assert losses == pytest.approx(expected, rel=1e-6)
    assert (plain - recorded).abs().max() < 1e-6


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_was_broken_off_goes_on_as_it_was(tmp_path: Path) -> None:
    cuda = Cuda()
    options = replace(cuda.options, checkpoint_every=10)
    whole, resumed = Denoiser().cuda(), Denoiser().cuda()
    first = train(whole, denoise, cuda.rows, options, name="demo")
    path = tmp_path / "state.pt"
    with pytest.raises(Stop):
        train(Denoiser().cuda(), denoise, cuda.rows, options, name="demo", checkpoint=path, progress=stop_at(40))
    second = train(resumed, denoise, cuda.rows, options, name="demo", checkpoint=path)
    assert second.steps == first.steps and second.best_step == first.best_step
    assert second.after == pytest.approx(first.after, rel=1e-6)
    assert (weights(whole) - weights(resumed)).abs().max() < 1e-6
