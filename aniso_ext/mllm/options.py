"""How a multimodal model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aniso_ext.errors import InputError

STAGES = ("projector", "full")
REPORTS = ("tensorboard", "wandb")
_INTEGERS = {
    "global_batch": 1,
    "device_batch": 1,
    "max_length": 2,
    "lora_rank": 0,
    "save_every": 1,
    "log_every": 1,
    "workers": 0,
    "seed": 0,
}
_NUMBERS = (
    "projector_learning_rate",
    "learning_rate",
    "projector_epochs",
    "epochs",
    "warmup",
    "weight_decay",
    "lora_alpha",
)


@dataclass(frozen=True)
class TrainOptions:
    """Two stages: the projector under a frozen language model, then everything (METHOD section 6).

    Attributes:
        stages: which of ``projector`` and ``full`` to run, in this order.
        projector_learning_rate, learning_rate: peaks of the two stages; linear warm-up, then a cosine to zero.
        projector_epochs, epochs: passes over the samples.
        max_steps: optimiser steps of each stage, in place of its passes.
        global_batch: samples of an optimiser step, over all processes and accumulated. With packing, as many rows as
            hold about that many samples.
        device_batch: rows that a device takes at a time, at most.
        warmup: share of the steps.
        weight_decay: of AdamW.
        max_length: most tokens of a sample, and with packing the tokens of a row.
        on_long: ``fail``, ``truncate`` or ``skip`` samples that are longer.
        packing: several samples in a row, none of which sees another.
        bf16: bfloat16 products over float32 weights; None for yes on a GPU.
        gradient_checkpointing: compute activations again in the backward pass.
        attention: implementation of the language model's attention, e.g. ``sdpa``, ``eager``, ``flex_attention``; None
            leaves it.
        compile: the layers of the language model by torch.compile; their first steps are slow.
        train_refiner: the language model's loss tunes the refiner of the correction, within its bounds.
        lora_rank: train low-rank updates of the language model in the full stage and merge them; 0 trains its weights.
        lora_alpha: their scale, alpha/rank; None for twice the rank.
        fsdp: shard weights, gradients and optimiser over the processes (FSDP2) in place of copying them.
        save_every: steps between states that a stopped run goes on from; the last step of a stage is always kept.
        log_every: steps between lines of the log.
        report_to: ``tensorboard`` or ``wandb``, beside the JSON lines.
        workers: processes that prepare batches.
        device: ``cpu``, ``cuda``; None takes a GPU where there is one.
        seed: of order, packing and noise.

    Raises:
        InputError: a value is out of range; the message names the option.

    Example:
        >>> TrainOptions(packing=True).global_batch
        256
    """

    stages: tuple[str, ...] = STAGES
    projector_learning_rate: float = 5e-4
    learning_rate: float = 1e-5
    projector_epochs: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    global_batch: int = 256
    device_batch: int = 8
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048
    on_long: str = "fail"
    packing: bool = False
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    attention: str | None = None
    compile: bool = False
    train_refiner: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    fsdp: bool = False
    save_every: int = 500
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    workers: int = 0
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.max_steps is not None and (isinstance(self.max_steps, bool) or not self.max_steps >= 1):
            raise InputError(f"max_steps must be at least 1, or None to go by passes, got {self.max_steps!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None and name == "lora_alpha":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"{name} must be a finite number that is not negative, got {value!r}")
        for name in ("projector_epochs", "epochs"):
            if not getattr(self, name):
                raise InputError(f"{name} must be positive: leave a stage out with stages")
        if self.warmup >= 1:
            raise InputError(f"warmup is a share of the steps, below 1, got {self.warmup!r}")

    def _check_choices(self) -> None:
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise InputError(f"stages must be some of {', '.join(STAGES)}, in this order, got {self.stages!r}")
        if self.on_long not in ("fail", "truncate", "skip"):
            raise InputError(f"on_long must be fail, truncate or skip, got {self.on_long!r}")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(f"device must be cpu, cuda or None, got {self.device!r}")
        unknown = sorted(set(self.report_to) - set(REPORTS))
        if unknown:
            raise InputError(f"report_to must be some of {', '.join(REPORTS)}, got {unknown[0]!r}")

    def rate(self, stage: str) -> float:
        """Peak learning rate of a stage."""
        return self.projector_learning_rate if stage == "projector" else self.learning_rate

    def passes(self, stage: str) -> float:
        """Epochs of a stage."""
        return self.projector_epochs if stage == "projector" else self.epochs

    def identity(self) -> dict[str, Any]:
        """The options that decide the result."""
        free = ("save_every", "log_every", "report_to", "workers", "device")
        return {name: value for name, value in vars(self).items() if name not in free}
