"""Run arms: fit the aligners once, train a model for each arm and seed, judge it on real target embeddings."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.data import open_embeddings
from aniso_ext.errors import InputError
from aniso_ext.mllm.arms.arms import Arm
from aniso_ext.mllm.arms.table import FLOOR, RESULT, Ladder, read_ladder
from aniso_ext.mllm.options import TrainOptions

if TYPE_CHECKING:
    from aniso_ext.mllm.data.samples import Samples
    from aniso_ext.mllm.library import transformers
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM

ALIGNERS, NEIGHBOURS, TOKENIZER, SAMPLES = "aligners", "neighbours", "tokenizer", "samples"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LadderData:
    """Files of a comparison. Source and target are rows of the same things, which only the bound makes use of.

    Attributes:
        source, target: embeddings of the training split, row i of both of the same thing.
        ids: file with the ids of those rows, see :func:`aniso_ext.mllm.open_index`.
        conversations: what the model is trained on, see :func:`aniso_ext.mllm.data.read_conversations`.
        test, test_ids, questions: target embeddings of other things, their ids, and what is asked of them.
        unpaired: target embeddings of other things than the rows, among which stand-ins find their neighbours; None:
            the target rows, for each stand-in the half of them that does not hold its own.
        validation_questions: the same of the training split, kept from ``conversations``; they choose among arms that
            are reported as one. Their ids are in ``ids``, their embeddings in ``target``.
    """

    source: str
    target: str
    ids: str
    conversations: str
    test: str
    test_ids: str
    questions: str
    validation_questions: str | None = None
    unpaired: str | None = None


@dataclass(frozen=True)
class LadderModel:
    """The language model of a comparison: of random weights, with a tokenizer made for it.

    Attributes:
        family, size: of :func:`aniso_ext.mllm.small_language_model`.
        vocab_size: of the tokenizer, at most.
        initializer_range: standard deviation of its first weights; None for the family's own, .02, which is little for
            widths below some hundreds.
        projector_gain: of :meth:`aniso_ext.mllm.AnisoMLLMForCausalLM.from_language_model`.
    """

    family: str = "llama"
    size: str = "10m"
    vocab_size: int = 4096
    initializer_range: float | None = None
    projector_gain: float | None = None


@dataclass(frozen=True)
class _Job:
    """One arm and seed; everything it needs is on disk, so that another process can run it."""

    arm: Arm
    seed: int
    data: LadderData
    model: LadderModel
    options: TrainOptions
    folder: str
    max_new_tokens: int
    batch_size: int

    @property
    def place(self) -> Path:
        return Path(self.folder) / self.arm.name / f"seed-{self.seed}"


def run_ladder(
    data: LadderData,
    arms: Sequence[Arm],
    *,
    output: str | os.PathLike[str],
    model: LadderModel | None = None,
    options: TrainOptions | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tuning_seeds: int | None = None,
    jobs: int = 1,
    max_new_tokens: int = 24,
    batch_size: int = 256,
    fit_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Ladder:
    """Train and judge every arm with every seed: same samples, order, budget and start for all.

    Runs that have a result in ``output`` are taken over. Each of the others leaves ``ARM/seed-S/result.json`` with its
    scores, ``predictions.jsonl`` and the losses of its training; weights are not kept.

    Args:
        data: the files.
        arms: see :data:`~aniso_ext.mllm.arms.ARMS`.
        output: folder of all that is shared or kept.
        model, options: of every run; the seed is that of the run.
        seeds: of weights, order and noise.
        tuning_seeds: with so many of the seeds all arms of a group are run, and with the others only the chosen one;
            None runs every arm with every seed.
        jobs: runs at a time, in processes of their own.
        max_new_tokens, batch_size: of the evaluation.
        fit_options: of every fit that knows them, e.g. {"device": "cuda"}.
        progress: called with (runs done, runs, name) after each run.

    Returns:
        The results, with :meth:`Ladder.table` and so on.

    Raises:
        InputError: arms are reported as one, and there are no validation questions to choose by.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    model, options = model or LadderModel(), options or TrainOptions(stages=("full",), learning_rate=1e-3)
    groups = {arm.tuned or arm.name for arm in arms}
    if len(groups) < len(arms) and data.validation_questions is None:
        raise InputError(
            f"{len(arms)} arms are reported as {len(groups)}, the best of each group: give the comparison validation "
            "questions to choose by, or arms that stand for themselves"
        )
    count = len(seeds) if tuning_seeds is None else tuning_seeds
    tuning, others = seeds[:count], seeds[count:]
    total = len(arms) * len(tuning) + len(groups) * len(others)
    done, wanted = 0, list(arms)
    for part in (tuning, others):
        runs = [
            _Job(arm, seed, data, model, options, str(folder), max_new_tokens, batch_size)
            for seed in part
            for arm in wanted
        ]
        missing = [job for job in runs if not (job.place / RESULT).is_file()]
        for job in missing:
            _prepare(job)
            _fit(job, fit_options or {})
            _find_neighbours(job)
        done += len(runs) - len(missing)
        for job in _finished(missing, jobs):
            done += 1
            if progress is not None:
                progress(done, total, f"{job.arm.name}, seed {job.seed}")
        found = read_ladder(folder, [arm.name for arm in arms])
        wanted = [arm for arm in arms if found.chosen.get(arm.tuned or arm.name, arm.name) == arm.name]
    return found


def _finished(runs: Sequence[_Job], jobs: int) -> Any:
    if jobs == 1:
        for job in runs:
            _run(job)
            yield job
        return
    import torch

    from aniso_ext.mllm.library import transformers

    logging = transformers.utils.logging
    settings = (max(1, torch.get_num_threads() // jobs), logging.get_verbosity(), logging.is_progress_bar_enabled())
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_process, initargs=settings
    ) as pool:
        started: dict[Future[None], _Job] = {pool.submit(_run, job): job for job in runs}
        for future in as_completed(started):
            future.result()
            yield started[future]


def _start_process(threads: int, verbosity: int, bars: bool) -> None:
    """A share of the threads, and no more talk than in the process that asked for the runs."""
    import torch

    from aniso_ext.mllm.library import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)
    if not bars:
        transformers.utils.logging.disable_progress_bar()


def _prepare(job: _Job) -> None:
    """Tokenizer and samples, which all runs share."""
    from aniso_ext.mllm.data import open_index, prepare_samples, read_conversations
    from aniso_ext.mllm.small import small_tokenizer

    folder = Path(job.folder)
    if not (folder / TOKENIZER).is_dir():
        texts = (turn["content"] for each in read_conversations(job.data.conversations) for turn in each.messages)
        small_tokenizer(texts, job.model.vocab_size).save_pretrained(folder / TOKENIZER)
    if not (folder / SAMPLES).is_dir():
        tokenizer = _tokenizer(job)
        samples = prepare_samples(
            read_conversations(job.data.conversations),
            tokenizer,
            open_index(job.data.ids),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            max_length=job.options.max_length,
            on_long=job.options.on_long,
        )
        samples.save(folder / SAMPLES)


def _fit(job: _Job, options: dict[str, Any]) -> None:
    """The aligner of an arm, on rows of both sides shuffled apart."""
    from aniso_ext.align import make_aligner

    shaped = job.arm.noise_shape == "residual"
    if job.arm.method is None or (_aligner(job).is_dir() and (not shaped or _shape(job).is_file())):
        return
    random = np.random.default_rng(0)
    sides = (open_embeddings(path).numpy() for path in (job.data.source, job.data.target))
    source, target = (rows[random.permutation(len(rows))] for rows in sides)
    if not _aligner(job).is_dir():
        aligner = make_aligner(job.arm.method, **job.arm.options)
        aligner.set_params(**{name: value for name, value in options.items() if name in aligner.parameter_names()})
        aligner.fit(source, target).save_pretrained(_aligner(job))
    if shaped:
        _save_shape(job, source, target)


def _save_shape(job: _Job, source: np.ndarray, target: np.ndarray) -> None:
    """The factor of the noise of an arm, from the stand-ins of the source and the target, still shuffled apart."""
    from aniso_ext.align import load_aligner
    from aniso_ext.align.residual import residual_noise_factor

    factor = residual_noise_factor(load_aligner(_aligner(job)), source, target)
    with open(_shape(job), "wb") as file:
        np.save(file, factor.numpy())


def _find_neighbours(job: _Job) -> None:
    """Stand-ins of an arm with neighbours, which are the same in every run, as a file."""
    import torch

    from aniso_ext.align import load_aligner
    from aniso_ext.align.neighbours import NeighbourMean

    if not job.arm.neighbours or _neighbours(job).is_file():
        return
    aligner = None if job.arm.method is None else load_aligner(_aligner(job))
    source, target = (open_embeddings(path).numpy() for path in (job.data.source, job.data.target))
    standins = torch.from_numpy(np.asarray(source, dtype=np.float32))
    standins = standins if aligner is None else aligner.transform(standins)
    centre = standins.mean(dim=0, dtype=torch.float64)
    found = torch.empty_like(standins)
    for rows, others in strangers(target, job.data.unpaired):
        mean = NeighbourMean(torch.from_numpy(others), centre, count=job.arm.neighbours)
        found[rows] = mean(standins[rows])
    _neighbours(job).parent.mkdir(parents=True, exist_ok=True)
    with open(_neighbours(job), "wb") as file:
        np.save(file, found.numpy())


def strangers(target: np.ndarray, unpaired: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of the training split, and target rows none of which is, or equals, the target of one of them."""
    if unpaired is not None:
        yield np.arange(len(target)), np.asarray(open_embeddings(unpaired).numpy(), dtype=np.float32)
        return
    rows = np.asarray(target, dtype=np.float32)
    copies = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
    first = np.random.default_rng(0).permutation(copies.max() + 1)[copies] % 2 == 0
    for own in (first, ~first):
        yield np.flatnonzero(own), rows[~own]


def _run(job: _Job) -> None:
    from aniso_ext.mllm.data.samples import Samples
    from aniso_ext.mllm.evaluation import evaluate
    from aniso_ext.mllm.training import train

    tokenizer = _tokenizer(job)
    model = _model(job, tokenizer)
    made = str(_neighbours(job)) if job.arm.neighbours else job.data.source
    rows = _rows(job, job.data.target if job.arm.rows == "target" else made)
    samples: Samples = Samples.load(Path(job.folder) / SAMPLES)
    shutil.rmtree(job.place, ignore_errors=True)
    training = job.place / "training"
    options = replace(job.options, seed=job.seed, train_refiner=job.arm.train_refiner)
    report = train(model, tokenizer, samples, rows, index=job.data.ids, options=options, output=training)
    found: dict[str, Any] = {"arm": job.arm.name, "tuned": job.arm.tuned, "seed": job.seed, "train": asdict(report)}
    judged = {"scores": (job.data.test, job.data.test_ids, job.data.questions, job.place)}
    if job.data.validation_questions is not None:
        judged["validation"] = (job.data.target, job.data.ids, job.data.validation_questions, None)  # type: ignore[assignment]
    for name, (embeddings, ids, questions, output) in judged.items():
        result = evaluate(
            model,
            tokenizer,
            _rows(job, embeddings),
            questions,
            index=ids,
            output=output,
            batch_size=job.batch_size,
            max_new_tokens=job.max_new_tokens,
        )
        found[name] = result.to_dict()["scores"]
    shutil.move(training / "log", job.place / "log")
    shutil.rmtree(training)
    place = job.place / RESULT
    temporary = place.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, place)


def _model(job: _Job, tokenizer: transformers.PreTrainedTokenizerBase) -> AnisoMLLMForCausalLM:
    import torch

    from aniso_ext.mllm.correction import Correction
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM
    from aniso_ext.mllm.small import small_language_model

    torch.manual_seed(job.seed)
    spread = job.model.initializer_range
    language = small_language_model(
        job.model.family,
        vocab_size=len(tokenizer),
        size=job.model.size,
        seed=job.seed,
        **({} if spread is None else {"initializer_range": spread}),
    )
    width = open_embeddings(job.data.test).width
    model = AnisoMLLMForCausalLM.from_language_model(
        language, tokenizer, embedding_width=width, projector_gain=job.model.projector_gain
    )
    arm = job.arm
    if arm.method is not None and not arm.neighbours:
        factor = torch.from_numpy(np.load(_shape(job))) if arm.noise_shape == "residual" else None
        model.set_correction(
            Correction.from_aligner(
                _aligner(job), noise_std=arm.noise_std, noise_factor=factor, trainable=arm.train_refiner
            )
        )
    elif arm.noise_std:
        model.set_correction(Correction.noise(arm.noise_std))
    return model


def _rows(job: _Job, embeddings: str) -> Any:
    """The embeddings; of the blind arm as many rows of ones, which say nothing."""
    found = open_embeddings(embeddings)
    if job.arm.rows != "nothing":
        return found
    return np.broadcast_to(np.float32(found.width**-0.5), (len(found), found.width))


def _tokenizer(job: _Job) -> transformers.PreTrainedTokenizerBase:
    from aniso_ext.mllm.library import transformers

    return transformers.AutoTokenizer.from_pretrained(Path(job.folder) / TOKENIZER)


def _aligner(job: _Job) -> Path:
    return Path(job.folder) / ALIGNERS / str(job.arm.aligner)


def _shape(job: _Job) -> Path:
    return Path(job.folder) / ALIGNERS / f"{job.arm.aligner}.noise.npy"


def _neighbours(job: _Job) -> Path:
    return Path(job.folder) / NEIGHBOURS / f"{job.arm.aligner or FLOOR}-{job.arm.neighbours}.npy"
