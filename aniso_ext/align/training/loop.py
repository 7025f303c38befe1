"""One training loop for both stages: AdamW, averaged weights, early stopping, resume, several processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from aniso_ext.align.processes import average, broadcast, check_batch_rows, generator_for
from aniso_ext.align.training.checkpoint import Checkpoint
from aniso_ext.align.training.options import TrainingOptions
from aniso_ext.align.training.records import StageLog, TrainingLog
from aniso_ext.align.training.steps import OptimiserStep, StepRunner, recorder_for
from aniso_ext.errors import InputError, TrainingError

FLUSH_EVERY = 20
"""Steps between looks at the losses on the host: each one waits for the device."""
_STEP, _HELD_OUT = range(2)

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Loss = Callable[[AnyModule, Any, torch.Generator], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
Progress = Callable[[int, int, Mapping[str, float]], None]


class Batches(Protocol):
    """What :func:`train` draws from; :class:`~aniso_ext.align.training.TrainingRows` is one.

    A batch is a tensor of rows, or a tuple of tensors of which the first counts the rows. Batches that are also
    :class:`Indexed` are gathered as part of the step.
    """

    fingerprint: str

    def batch(self, step: int, batch_rows: int, seed: int) -> Any:
        """This process's share of the global batch of a step: a function of (seed, step)."""

    def held_out_batches(self, batch_rows: int) -> Iterator[Any]:
        """This process's share of the rows that are never trained on."""


@runtime_checkable
class Indexed(Protocol):
    """Batches out of rows that lie on the device: ``batch(...)`` is ``gather(positions(...))``."""

    def positions(self, step: int, batch_rows: int, seed: int) -> Any:
        """Where the rows of a batch lie: a small tensor or a tuple of them, a function of (seed, step)."""

    def gather(self, positions: Any) -> Any:
        """The batch of these positions."""


@dataclass(frozen=True)
class TrainingRecord:
    """What a stage did.

    Attributes:
        name: of the stage.
        steps: optimiser steps done.
        best_step: steps behind the returned weights; 0 if no later weights were better than the start.
        stopped_early: whether patience ran out.
        before, after: held-out losses at the start and of the returned weights: ``loss`` and the named parts.
    """

    name: str
    steps: int
    best_step: int
    stopped_early: bool
    before: dict[str, float]
    after: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """The record as plain values: <stage>_steps, _best_step, _stopped_early, and _<part>_before and _after."""
        plain = {name: getattr(self, name) for name in ("steps", "best_step", "stopped_early")}
        for key in self.before:
            plain |= {f"{key}_before": self.before[key], f"{key}_after": self.after[key]}
        return {f"{self.name}_{name}": value for name, value in plain.items()}


def train(
    module: AnyModule,
    loss: Loss[AnyModule],
    batches: Batches,
    options: TrainingOptions,
    *,
    name: str,
    held_out_loss: Loss[AnyModule] | None = None,
    identity: Mapping[str, Any] | None = None,
    log: TrainingLog | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TrainingRecord:
    """Minimise a loss over the parameters of ``module`` that require a gradient; the module is changed in place.

    Each step: a batch and a generator that are functions of (seed, step); ``loss(module, batch, generator)``; gradients
    averaged over the processes of torch.distributed, if any, and clipped; AdamW; averaged weights w <- d w + (1 - d) p.
    Held-out losses are those of the averaged weights, with the same noise each time. The module ends with the averaged
    weights of the lowest one, those of the start included. On the CPU the result is a function of the arguments to the
    bit, also where the run was broken off and went on from its checkpoint.

    Args:
        module: on the device of the batches; only its parameters are trained and saved.
        loss: gives the mean over the batch's rows and named scalar parts to report; draws from the generator (on the
            device of the module) and from nothing else. On a GPU it is recorded as part of a CUDA graph after a few
            steps: it must not wait for the device, and what it computes on the host it computes once. It may bring its
            gradients along (:class:`aniso_ext.align.training.steps.Differentiated`).
        batches: what to draw from.
        options: schedule and optimiser.
        name: of the stage, in files and errors.
        held_out_loss: of a held-out batch; ``loss`` if None.
        identity: what else decides the result (weights of losses, the frame), as plain values: a checkpoint with
            another identity is refused.
        log: where losses are written.
        checkpoint: file to save the state to and to go on from.
        progress: called as progress(steps done, steps, {"loss": ..., parts}).

    Raises:
        TrainingError: a loss is not finite; the message names stage, step and part.
        DataError: the checkpoint is damaged or of another run.
        InputError: the module has nothing to train, or the rows cannot be shared among the processes.

    Example:
        >>> import torch
        >>> from aniso_ext.align.training import TrainingRows
        >>> rows = TrainingRows.split(torch.randn(200, 3) + 1, name="demo", fingerprint="demo", seed=0)
        >>> class Mean(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.value = torch.nn.Parameter(torch.zeros(3))
        >>> def squared(module, batch, generator):
        ...     return (batch - module.value).square().sum(1).mean(), {}
        >>> options = TrainingOptions(steps=300, batch_rows=64, learning_rate=0.05)
        >>> record = train(Mean(), squared, rows, options, name="demo")
        >>> record.after["loss"] < record.before["loss"]
        True
    """
    held_out, fixed = held_out_loss or loss, dict(identity or {})
    run = TrainingRun(module, loss, batches, options, name, held_out, fixed, checkpoint, progress)
    with log.open(name, run.step) if log is not None else nullcontext() as stage_log:
        run.log = stage_log
        return run.finish()


class TrainingRun:
    """State of one call of :func:`train`."""

    def __init__(
        self,
        module: Any,
        loss: Loss[Any],
        batches: Batches,
        options: TrainingOptions,
        name: str,
        held_out_loss: Loss[Any],
        identity: dict[str, Any],
        checkpoint: str | PathLike[str] | None,
        progress: Progress | None,
    ) -> None:
        check_batch_rows(options.batch_rows)
        self.module, self.loss, self.batches, self.options, self.name = module, loss, batches, options, name
        self.held_out_loss, self.progress = held_out_loss, progress
        self.log: StageLog | None = None
        self.parameters = {key: value for key, value in module.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise InputError(f"{name}: the module has no parameters to train")
        self.device = next(iter(self.parameters.values())).device
        broadcast(list(self.parameters.values()))
        self.average = self._copy(self.parameters)
        self.best = self._copy(self.parameters)
        self.optimizer = self._optimizer()
        self.step = self.best_step = self.waited = 0
        self.finished = self.stopped_early = False
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.checkpoint = None if checkpoint is None else Checkpoint(checkpoint, self._identity(identity))
        self._resume()
        self.runner = StepRunner(self._step(), name, recorder_for(self.device))

    def _step(self) -> OptimiserStep:
        return OptimiserStep(
            self.module,
            self.loss,
            list(self.parameters.values()),
            list(self.average.values()),
            self.optimizer,
            autocast=self.options.autocast,
            gather=self.batches.gather if isinstance(self.batches, Indexed) else None,
        )

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [value for value in self.parameters.values() if value.dim() > 1]
        vectors = [value for value in self.parameters.values() if value.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": float(self.options.weight_decay)},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, fused=self.device.type == "cuda"
        )

    def finish(self) -> TrainingRecord:
        """Train to the end and hand back the best weights."""
        if not self.before:
            self.before = self.after = self._held_out()
            self._write(0, "held_out", self.before)
        while self.step < self.options.steps and not self.finished:
            self.advance()
            last = self.step == self.options.steps
            if self.step % FLUSH_EVERY == 0 or last:
                self._flush()
            if self.step % self.options.evaluate_every == 0 or last:
                self._evaluate()
            if self.options.checkpoint_every and self.step % self.options.checkpoint_every == 0:
                self._save()
        if not self.finished:
            self._flush()
            self.finished = True
            self._save()
        self.runner.release()
        self._install(self.best)
        return TrainingRecord(self.name, self.step, self.best_step, self.stopped_early, self.before, self.after)

    def advance(self) -> None:
        """One optimiser step."""
        options, step = self.options, self.step
        draw = self.batches.positions if isinstance(self.batches, Indexed) else self.batches.batch
        batch = draw(step, options.batch_rows, options.seed)
        key = (options.seed, _STEP, step)
        values = self.runner(batch, key, options.rate(step), 1 - options.decay(step))
        self.step += 1
        self._pending.append((self.step, values))

    def _evaluate(self) -> None:
        """Held-out losses of the averaged weights; remember the best, stop when patience runs out."""
        self._flush()
        values = self._held_out()
        self._write(self.step, "held_out", values)
        if values["loss"] < self.after["loss"]:
            self.after, self.best_step, self.waited = values, self.step, 0
            self.best = self._copy(self.average)
        else:
            self.waited += 1
            if self.options.patience and self.waited >= self.options.patience:
                self.finished = self.stopped_early = True
                self._save()

    def _held_out(self) -> dict[str, float]:
        trained = self._copy(self.parameters)
        self._install(self.average)
        totals: dict[str, torch.Tensor] = {}
        rows = 0
        with torch.no_grad():
            for index, batch in enumerate(self.batches.held_out_batches(self.options.batch_rows)):
                generator = generator_for(self.device, self.options.seed, _HELD_OUT, index)
                with self.runner.body.autocast():
                    value, parts = self.held_out_loss(self.module, batch, generator)
                count = len(batch[0] if isinstance(batch, (tuple, list)) else batch)
                for key, part in {"loss": value, **parts}.items():
                    totals[key] = totals.get(key, 0) + count * part.detach().double()
                rows += count
        if not rows:
            raise InputError(f"{self.name}: a process has no held-out rows: use fewer processes or more rows")
        average(list(totals.values()))
        self._install(trained)
        return self._finite({key: float(total) / rows for key, total in totals.items()}, self.step, "held-out ")

    def _flush(self) -> None:
        """Bring the losses of the last steps to the host: check, write and report them."""
        if not self._pending:
            return
        # one transfer for all of them
        numbers_of = iter(torch.stack([value for _, values in self._pending for value in values.values()]).tolist())
        for step, values in self._pending:
            numbers = self._finite({key: next(numbers_of) for key in values}, step, "")
            self._write(step, "train", numbers)
            if self.progress is not None and step == self.step:
                self.progress(step, self.options.steps, numbers)
        self._pending.clear()

    def _finite(self, values: dict[str, float], step: int, kind: str) -> dict[str, float]:
        for key, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.name}: the {kind}{key} is {value} after {step} of {self.options.steps} steps: look for "
                    "non-finite rows, or lower the learning rate"
                )
        return values

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(step, split, values)
            if split != "train":
                self.log.flush()

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.detach().clone() for key, value in tensors.items()}

    def _install(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(weights[key])

    def _identity(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        shapes = ";".join(f"{key}:{list(value.shape)}:{value.dtype}" for key, value in self.parameters.items())
        start = hashlib.sha256(shapes.encode())
        for value in self.parameters.values():
            start.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            "stage": self.name,
            "data": self.batches.fingerprint,
            "start": start.hexdigest(),
            **{f"option {key}": value for key, value in self.options.identity().items()},
            **extra,
        }

    def _save(self) -> None:
        if self.log is not None:
            self.log.flush()
        if self.checkpoint is None:
            return
        self.checkpoint.save(
            {
                "parameters": self._copy(self.parameters),
                "average": self.average,
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "best_step": self.best_step,
                "waited": self.waited,
                "finished": self.finished,
                "stopped_early": self.stopped_early,
                "before": self.before,
                "after": self.after,
            }
        )

    def _resume(self) -> None:
        state = None if self.checkpoint is None else self.checkpoint.load(self.device)
        done = torch.tensor([0.0 if state is None else state["step"]], dtype=torch.float64, device=self.device)
        mine = float(done)
        average([done])
        if float(done) != mine:
            raise InputError(
                f"{self.name}: the processes see different checkpoints: put it on a disk that all of them see"
            )
        if state is None:
            return
        self._install(state["parameters"])
        self.average, self.best = state["average"], state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = False  # until this run has recorded its own step
        for name in ("step", "best_step", "waited", "finished", "stopped_early", "before", "after"):
            setattr(self, name, state[name])
