"""One stage of the training: which weights move, the trainer, its log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.errors import InputError
from aniso_ext.mllm.library import transformers

if TYPE_CHECKING:
    from aniso_ext.align.training import TrainingLog
    from aniso_ext.mllm.data import Batcher, SampleDataset
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM
    from aniso_ext.mllm.options import TrainOptions

LOG = "log"


@dataclass
class StageRun:
    """What the stages of a run share."""

    model: AnisoMLLMForCausalLM
    tokenizer: transformers.PreTrainedTokenizerBase
    dataset: SampleDataset
    batcher: Batcher
    samples_per_row: float
    options: TrainOptions
    folder: Path
    resume: bool
    progress: Callable[[str, int, int], None] | None


@dataclass(frozen=True)
class StageReport:
    """What a stage did: steps, rows of a step, weights that moved, losses of its first and its last logged step."""

    name: str
    steps: int
    rows_per_step: int
    trained_parameters: int
    first_loss: float | None
    last_loss: float | None
    seconds: float


def run_stage(run: StageRun, stage: str) -> StageReport:
    """Train one stage, from its last state where the run is resumed."""
    started = time.perf_counter()
    model, options = run.model, run.options
    _choose_weights(run, stage)
    arguments = _arguments(run, stage)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=run.dataset,
        data_collator=run.batcher,
        processing_class=run.tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    from aniso_ext.align.training import TrainingLog

    trainer.add_callback(_callback(TrainingLog(run.folder / LOG), stage, run.progress))
    state = transformers.trainer_utils.get_last_checkpoint(arguments.output_dir) if run.resume else None
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    trainer.train(resume_from_checkpoint=state)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return StageReport(
        name=stage,
        steps=trainer.state.global_step,
        rows_per_step=_rows_per_step(arguments),
        trained_parameters=trained,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        seconds=time.perf_counter() - started,
    )


def _choose_weights(run: StageRun, stage: str) -> None:
    model, options = run.model, run.options
    model.language_model.requires_grad_(stage == "full")
    model.projector.requires_grad_(True)
    if model.correction is not None:
        model.correction.requires_grad_(options.train_refiner)
    if options.attention is not None:
        model.language_model.set_attn_implementation(options.attention)


def _arguments(run: StageRun, stage: str) -> transformers.TrainingArguments:
    import torch

    options = run.options
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if options.device == "cuda" and on_cpu:
        raise InputError("device is cuda, but torch sees no GPU: choose cpu, or check the driver")
    rows = max(1, round(options.global_batch / run.samples_per_row))
    device_rows, accumulated = _split(rows, options.device_batch, int(os.environ.get("WORLD_SIZE", "1")))
    arguments = transformers.TrainingArguments(
        output_dir=str(run.folder / stage),
        per_device_train_batch_size=device_rows,
        gradient_accumulation_steps=accumulated,
        learning_rate=options.rate(stage),
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        num_train_epochs=options.passes(stage),
        max_steps=options.max_steps or -1,
        bf16=not on_cpu if options.bf16 is None else options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=on_cpu,
        logging_steps=options.log_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=1,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=not on_cpu,
        seed=options.seed + (stage == "full"),
        fsdp=options.fsdp or None,
        fsdp_config={"version": 2} if options.fsdp else None,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs go by torchrun, never by threads of one process
    return arguments


def _split(rows: int, device_rows: int, processes: int) -> tuple[int, int]:
    """Rows at a time of each process and how often they are accumulated, so that a step has ``rows`` or just more."""
    share = -(-rows // processes)
    accumulated = -(-share // device_rows)
    return -(-share // accumulated), accumulated


def _rows_per_step(arguments: transformers.TrainingArguments) -> int:
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return int(per_process * arguments.world_size)


def _callback(
    log: TrainingLog, stage: str, progress: Callable[[str, int, int], None] | None
) -> transformers.TrainerCallback:
    """Losses as JSON lines, and steps to whoever watches."""

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.file = log.open(stage, state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            names = ("loss", "learning_rate", "grad_norm")
            values = {name: float(logs[name]) for name in names if logs and name in logs}
            if "loss" in values:
                self.file.write(state.global_step, "train", values)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.file.flush()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if progress is not None:
                progress(stage, state.global_step, state.max_steps)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.file.flush()

    return Watch()
