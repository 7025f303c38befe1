"""Training of a multimodal model on text and stand-ins by transformers' Trainer (METHOD section 6)."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.data import EmbeddingSet, open_embeddings
from aniso_ext.data.encoder import find_encoder_record
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.data import (
    Batcher,
    EmbeddingIndex,
    SampleDataset,
    Samples,
    open_index,
    plan_packs,
    prepare_samples,
    read_conversations,
)
from aniso_ext.mllm.library import transformers
from aniso_ext.mllm.options import TrainOptions
from aniso_ext.mllm.stage import Progress, StageReport, StageRun, run_stage, runs_on_cpu

if TYPE_CHECKING:
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM

RUN, REPORT, SAMPLES, ALIGNER = "run.json", "train_report.json", "samples", "aligner"


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    Attributes:
        output: folder of the trained model and its tokenizer.
        samples, tokens, targets: how many were trained on, and of the tokens how many the loss counts.
        rows: rows of tokens of a pass; with packing fewer than samples.
        truncated, skipped: ids of samples that were too long.
        aligner_fingerprint: of the correction; None where embeddings entered as they are.
        stages: what each stage did.
        seconds: of all.
    """

    output: str
    samples: int
    tokens: int
    targets: int
    rows: int
    truncated: tuple[str, ...]
    skipped: tuple[str, ...]
    aligner_fingerprint: str | None
    stages: tuple[StageReport, ...]
    seconds: float


def train(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    conversations: Any,
    embeddings: Any,
    *,
    index: Any = None,
    options: TrainOptions | None = None,
    output: str | os.PathLike[str],
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainReport:
    """Train a model on conversations and the embeddings of their samples, in two stages.

    The correction of the model, if it has one, makes stand-ins of the embeddings on the fly. Under torchrun the
    processes share each batch. ``output`` gets the model, the tokenizer, ``log/*.jsonl`` with the losses,
    ``train_report.json``, the states of both stages, ``encoder.json`` where the embeddings have one, and ``aligner/``
    where the refiner was trained.

    Args:
        model: trained in place, then in evaluation mode; with ``options.fsdp`` take the result from ``output``.
        tokenizer: that the model was made with.
        conversations: what :func:`~aniso_ext.mllm.data.read_conversations` takes, or samples of
            :func:`~aniso_ext.mllm.data.prepare_samples`.
        embeddings: source embeddings, what :func:`aniso_ext.data.open_embeddings` takes.
        index: what :func:`~aniso_ext.mllm.open_index` takes; None looks for metadata beside the embeddings.
        options: schedule and form of the training.
        output: a new or empty folder, or that of the run to resume.
        resume: go on from the last state in ``output``; on the CPU the result is that of an unbroken run, to the bit.
        progress: called as progress(stage, steps done, steps).

    Raises:
        DataError: a sample that cannot be used, named by its id; an output folder of another run.
        InputError: widths or options that do not fit each other.
    """
    started = time.perf_counter()
    options = options or TrainOptions()
    embedding_set = open_embeddings(embeddings)
    _check_model(model, embedding_set, options)
    _check_reports(options)
    ids = _index(index, embeddings, embedding_set)
    folder = Path(output)
    samples = _shared_samples(model, tokenizer, conversations, ids, options, folder, resume)
    rows = _rows(samples, options)
    correction = model.correction
    fingerprint = None if correction is None else correction.fingerprint
    model.config.aligner_fingerprint = fingerprint
    _check_run(folder, _identity(model, samples, embedding_set, options, fingerprint), resume)
    run = StageRun(
        model=model,
        tokenizer=tokenizer,
        dataset=SampleDataset(rows),
        batcher=Batcher(samples, embedding_set, pad_token_id=_pad(tokenizer), packed=options.packing),
        samples_per_row=len(samples) / len(rows),
        options=options,
        folder=folder,
        resume=resume,
        progress=progress,
    )
    stages = tuple(run_stage(run, stage) for stage in options.stages)
    report = TrainReport(
        output=str(folder),
        samples=len(samples),
        tokens=len(samples.tokens),
        targets=int(samples.targets.sum()),
        rows=len(rows),
        truncated=samples.truncated,
        skipped=samples.skipped,
        aligner_fingerprint=fingerprint,
        stages=stages,
        seconds=time.perf_counter() - started,
    )
    _save(run, report, embedding_set)
    run.model.eval()
    return report


def _check_model(model: AnisoMLLMForCausalLM, embeddings: EmbeddingSet, options: TrainOptions) -> None:
    wanted = model.config.embedding_width
    if embeddings.width != wanted:
        raise InputError(
            f"the embeddings have width {embeddings.width}, but the projector takes {wanted}: use embeddings of the "
            "encoder that the model was made for, or make the projector anew"
        )
    if options.train_refiner and (model.correction is None or model.correction.refined is None):
        raise InputError(
            "train_refiner needs a correction whose refiner takes gradients: "
            "model.set_correction(Correction.from_aligner(..., trainable=True))"
        )


def _check_reports(options: TrainOptions) -> None:
    for name in options.report_to:
        if find_spec(name) is None:
            extra = "'aniso_ext[tensorboard]'" if name == "tensorboard" else name
            raise InputError(f"{name} is not installed: pip install {extra}, or leave it out of report_to")


def _index(index: Any, embeddings: Any, embedding_set: EmbeddingSet) -> EmbeddingIndex:
    if index is None and not isinstance(embeddings, (str, os.PathLike)):
        raise InputError("embeddings that are no files need an index: pass index=[id of row 0, id of row 1, ...]")
    ids = open_index(embeddings if index is None else index)
    if len(ids) != len(embedding_set):
        raise DataError(
            f"{ids.name} has {len(ids):,} ids for {len(embedding_set):,} embeddings: use files of one run, in one order"
        )
    return ids


def _shared_samples(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    conversations: Any,
    index: EmbeddingIndex,
    options: TrainOptions,
    folder: Path,
    resume: bool,
) -> Samples:
    """The samples as files of the output: the first process writes them, all map them."""
    from accelerate import PartialState

    place = folder / SAMPLES
    state = PartialState(cpu=runs_on_cpu(options))
    lost: dict[str, Any] = {}
    if state.is_main_process:
        if not resume and folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty: name a new folder, or resume the run in it")
        if isinstance(conversations, Samples):
            samples = conversations
        else:
            samples = prepare_samples(
                read_conversations(conversations),
                tokenizer,
                index,
                image_token_id=model.config.image_token_id,
                visual_tokens=model.config.visual_tokens,
                max_length=options.max_length,
                on_long=options.on_long,
            )
        samples.save(place)
        lost = {"truncated": samples.truncated, "skipped": samples.skipped}
    state.wait_for_everyone()
    return Samples.load(place, **lost)


def _rows(samples: Samples, options: TrainOptions) -> list[Any]:
    import numpy as np

    if options.packing:
        return plan_packs(samples.lengths, options.max_length, seed=options.seed)
    return list(np.arange(len(samples))[:, None])


def _pad(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else int(pad)


def _identity(
    model: AnisoMLLMForCausalLM,
    samples: Samples,
    embeddings: EmbeddingSet,
    options: TrainOptions,
    fingerprint: str | None,
) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes."""
    import hashlib

    digest = hashlib.sha256()
    for values in (samples.tokens, samples.targets, samples.ends, samples.rows):
        digest.update(values.tobytes())
    identity = {
        "samples": digest.hexdigest(),
        "embeddings": embeddings.fingerprint(),
        "aligner": fingerprint,
        "options": options.identity(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "embedding_width": model.config.embedding_width,
        "visual_tokens": model.config.visual_tokens,
    }
    return dict(json.loads(json.dumps(identity)))


def _check_run(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    from accelerate import PartialState

    path = folder / RUN
    before = json.loads(path.read_text(encoding="utf-8")) if resume and path.is_file() else None
    PartialState().wait_for_everyone()  # all have looked before the first process writes
    if before is not None:
        changed = [name for name, value in identity.items() if before.get(name) != value]
        if changed:
            raise DataError(
                f"{folder} holds a run with other {', '.join(changed)}: resume it as it was started, or name a new "
                "folder"
            )
    elif PartialState().is_main_process:
        path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _save(run: StageRun, report: TrainReport, embeddings: EmbeddingSet) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    model, correction = run.model, run.model.correction
    if run.options.train_refiner and correction is not None:
        tuned = correction.tuned_aligner()
        assert tuned is not None
        tuned.save_pretrained(run.folder / ALIGNER)
    model.set_correction(None)
    model.save_pretrained(run.folder)
    model.set_correction(correction)
    run.tokenizer.save_pretrained(run.folder)
    path = embeddings.shards[0].path
    if path is not None and (record := find_encoder_record(path)) is not None:
        record.write(run.folder)
    (run.folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
