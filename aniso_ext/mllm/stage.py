"""One stage of the training: which weights move, the trainer, its log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aniso_ext.align.training import TrainingLog
from aniso_ext.errors import InputError
from aniso_ext.mllm.library import transformers
from aniso_ext.mllm.model import AnisoMLLMForCausalLM
from aniso_ext.mllm.sharding import ShardingTrainer, whole_model

if TYPE_CHECKING:
    from aniso_ext.mllm.data import Batcher, SampleDataset
    from aniso_ext.mllm.options import TrainOptions

LOG = "log"
PROCESS_SEEDS = 1_000_003
"""Between the seeds of two processes."""
Progress = Callable[[str, int, int], None]
"""progress(stage, steps done, steps)"""


@dataclass
class StageRun:
    """What the stages of a run share; ``model`` becomes another object where its weights were sharded."""

    model: AnisoMLLMForCausalLM
    tokenizer: transformers.PreTrainedTokenizerBase
    dataset: SampleDataset
    batcher: Batcher
    samples_per_row: float
    options: TrainOptions
    folder: Path
    resume: bool
    progress: Progress | None


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


def runs_on_cpu(options: TrainOptions) -> bool:
    """Whether this machine trains on the CPU under these options.

    Raises:
        InputError: a GPU was asked for, and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees no GPU: choose cpu, or check the driver")
    return options.device == "cpu" or not torch.cuda.is_available()


def run_stage(run: StageRun, stage: str) -> StageReport:
    """Train one stage, from its last state where the run is resumed."""
    started = time.perf_counter()
    _choose_weights(run.model, run.options, stage)
    trained = sum(value.numel() for value in run.model.parameters() if value.requires_grad)
    arguments = _arguments(run, stage)
    trainer = ShardingTrainer(
        model=run.model,
        args=arguments,
        train_dataset=run.dataset,
        data_collator=run.batcher,
        processing_class=run.tokenizer,
    )
    if (number := arguments.process_index) > 0:
        torch.manual_seed(arguments.seed + number * PROCESS_SEEDS)  # the same noise on all would be less noise
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Watch(TrainingLog(run.folder / LOG), stage, run.progress))
    trainer.train(resume_from_checkpoint=_last_state(arguments) if run.resume else None)
    if run.options.fsdp:
        trainer.accelerator.wait_for_everyone()  # the first process may still be writing
        state = _last_state(arguments)
        assert state is not None
        run.model = whole_model(run.model, state)
    _merge_low_rank(run.model)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return StageReport(
        name=stage,
        steps=trainer.state.global_step,
        rows_per_step=arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size,
        trained_parameters=trained,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        seconds=time.perf_counter() - started,
    )


class Watch(transformers.TrainerCallback):
    """Losses as JSON lines, and steps to whoever watches."""

    def __init__(self, log: TrainingLog, stage: str, progress: Progress | None) -> None:
        self.log, self.stage, self.progress = log, stage, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.file = self.log.open(self.stage, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        names = ("loss", "learning_rate", "grad_norm")
        values = {name: float(logs[name]) for name in names if logs and name in logs}
        if "loss" in values:
            self.file.write(state.global_step, "train", values)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.file.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress(self.stage, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.file.flush()


def _last_state(arguments: transformers.TrainingArguments) -> str | None:
    """Folder of the last state of a stage; None where it has none. The first process alone makes the stage's folder."""
    if not Path(arguments.output_dir).is_dir():
        return None
    found: str | None = transformers.trainer_utils.get_last_checkpoint(arguments.output_dir)
    return found


def _choose_weights(model: AnisoMLLMForCausalLM, options: TrainOptions, stage: str) -> None:
    if options.attention is not None:
        model.language_model.set_attn_implementation(options.attention)
    model.language_model.requires_grad_(stage == "full")
    if stage == "full" and options.lora_rank:
        model.language_model = _low_rank(model.language_model, options)
    if options.compile:
        _compile_layers(model.language_model)
    model.projector.requires_grad_(True)
    if model.correction is not None:
        model.correction.requires_grad_(options.train_refiner)


def _compile_layers(language_model: Any) -> None:
    """Each layer by itself: all share one compilation, and what looks at the batch to make a mask stays outside."""
    layers = set(language_model._no_split_modules or ())
    for module in language_model.modules():
        if type(module).__name__ in layers:
            module.compile()


def _low_rank(language_model: Any, options: TrainOptions) -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("peft is not installed: pip install 'aniso_ext[mllm]', or leave lora_rank 0") from None
    alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    config = peft.LoraConfig(
        r=options.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return peft.get_peft_model(language_model, config)


def _merge_low_rank(model: AnisoMLLMForCausalLM) -> None:
    merge = getattr(model.language_model, "merge_and_unload", None)
    if merge is not None:
        model.language_model = merge()


def _arguments(run: StageRun, stage: str) -> transformers.TrainingArguments:
    options, on_cpu = run.options, runs_on_cpu(run.options)
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
        **_checkpointing(options.gradient_checkpointing and not options.fsdp),
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
        data_seed=options.seed + (stage == "full"),
        fsdp=options.fsdp or None,
        fsdp_config={"version": 2, "activation_checkpointing": options.gradient_checkpointing},
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs go by torchrun, never by threads of one process
    if on_cpu:
        # accelerate numbers the CPUs of several processes, and torch restores no state to such a place
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    return arguments


def _checkpointing(chosen: bool) -> dict[str, Any]:
    """The options of transformers that compute activations again; it renames them and deprecates the old names."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: chosen, f"{name}_kwargs": {"use_reentrant": False}}


def _split(rows: int, device_rows: int, processes: int) -> tuple[int, int]:
    """Rows at a time of each process and how often they are accumulated, so that a step has ``rows`` or just more."""
    share = -(-rows // processes)
    accumulated = -(-share // device_rows)
    return -(-share // accumulated), accumulated
