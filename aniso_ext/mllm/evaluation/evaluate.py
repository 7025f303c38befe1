"""Ask a model all questions, keep its answers, score them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.data import open_embeddings
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.evaluation.answers import generate_answers, score_choices
from aniso_ext.mllm.evaluation.captions import bleu_of, bleu_statistics, cider_d, words
from aniso_ext.mllm.evaluation.questions import Question, read_questions
from aniso_ext.mllm.evaluation.scores import EvaluationReport, Score, f1_of, mean_score, resampled_score

if TYPE_CHECKING:
    from aniso_ext.mllm.library import transformers
    from aniso_ext.mllm.model import AnisoMLLMForCausalLM

PREDICTIONS = "predictions.jsonl"
Progress = Callable[[int, int], None]


def evaluate(
    model: AnisoMLLMForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    embeddings: Any,
    questions: Any,
    *,
    index: Any = None,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Answers and scores on real embeddings of the target modality, which enter as they are.

    Captions and attributes are generated greedily; an attribute is right if its answer is that, letters' case and
    surrounding punctuation aside. Of a multiple choice and of yes or no the likelier answer by token counts.

    Args:
        embeddings: anything that :func:`aniso_ext.data.open_embeddings` takes.
        questions: a JSONL file or records, see :func:`read_questions`.
        index: ids of the embeddings, see :func:`aniso_ext.mllm.open_index`; None looks for metadata beside them.
        output: folder for ``predictions.jsonl``, one line a question.
        progress: called with (questions answered, questions).

    Raises:
        DataError: a question without embedding, or one that cannot be used; the message names it.
        InputError: embeddings of another width than the model's.
    """
    rows_of = _finder(embeddings, index, model)
    listed = questions if _are_questions(questions) else read_questions(questions)
    rows = rows_of(listed)
    answers: list[str] = [""] * len(listed)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(listed))

    written = [place for place, question in enumerate(listed) if question.kind in ("caption", "attribute")]
    if written:
        prompts = [listed[place].question for place in written]
        found = generate_answers(
            model,
            tokenizer,
            rows[written],
            prompts,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            advance=advance,
        )
        for place, answer in zip(written, found, strict=True):
            answers[place] = answer
    chosen = [place for place, question in enumerate(listed) if question.kind in ("multiple_choice", "yes_no")]
    if chosen:
        choices = [listed[place].choices or ("yes", "no") for place in chosen]
        prompts = [listed[place].question for place in chosen]
        scored = score_choices(model, tokenizer, rows[chosen], prompts, choices, batch_size=batch_size)
        for place, options, likely in zip(chosen, choices, scored, strict=True):
            answers[place] = options[int(np.argmax(likely))]
        advance(len(chosen))
    return _report(listed, answers, None if output is None else Path(output))


def _are_questions(questions: Any) -> bool:
    return isinstance(questions, list) and all(isinstance(question, Question) for question in questions)


def _finder(embeddings: Any, index: Any, model: AnisoMLLMForCausalLM) -> Callable[[Sequence[Question]], np.ndarray]:
    from aniso_ext.mllm.data import open_index

    found = open_embeddings(embeddings)
    wanted = model.config.embedding_width
    if found.width != wanted:
        raise InputError(
            f"the embeddings have width {found.width}, but the projector takes {wanted}: use embeddings of the encoder "
            "that the model was trained with"
        )
    ids = open_index(embeddings if index is None else index)

    def rows_of(questions: Sequence[Question]) -> np.ndarray:
        places = ids.rows([question.id for question in questions])
        if (places < 0).any():
            lost = questions[int(np.argmax(places < 0))].id
            raise DataError(f"question {lost!r} has no embedding: {ids.name} has no such id; embed it, or leave it out")
        distinct, order = np.unique(places, return_inverse=True)
        return found.read(distinct).astype(np.float32)[order]

    return rows_of


def _report(questions: Sequence[Question], answers: Sequence[str], output: Path | None) -> EvaluationReport:
    correct = [_is_right(question, answer) for question, answer in zip(questions, answers, strict=True)]
    place = None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        place = output / PREDICTIONS
        lines = (
            json.dumps({**_filled(question), "prediction": answer, "correct": right}, ensure_ascii=False)
            for question, answer, right in zip(questions, answers, correct, strict=True)
        )
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scores = dict(_scores(questions, answers, correct))
    return EvaluationReport(scores, None if place is None else str(place))


def _filled(question: Question) -> dict[str, Any]:
    return {name: value for name, value in asdict(question).items() if value}


def _is_right(question: Question, answer: str) -> bool | None:
    if question.kind == "caption":
        return None
    return answer.strip(" .!").casefold() == question.answer.strip(" .!").casefold()


def _scores(
    questions: Sequence[Question], answers: Sequence[str], correct: Sequence[bool | None]
) -> Iterator[tuple[str, Score]]:
    captions = [place for place, question in enumerate(questions) if question.kind == "caption"]
    if captions:
        found = [words(answers[place]) for place in captions]
        wanted = [[words(text) for text in questions[place].references] for place in captions]
        yield "cider_d", mean_score(cider_d(found, wanted))
        statistics = bleu_statistics(found, wanted)
        for n in range(4):
            yield f"bleu_{n + 1}", resampled_score(statistics, lambda total, n=n: bleu_of(total)[n])
    for kind in ("multiple_choice", "yes_no", "attribute"):
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        if places:
            yield kind, mean_score([float(bool(correct[place])) for place in places])
            if kind == "yes_no":
                yield from _yes_no([questions[place].answer for place in places], [answers[place] for place in places])
            if kind == "attribute":
                for name in dict.fromkeys(questions[place].attribute for place in places):
                    own = [place for place in places if questions[place].attribute == name]
                    yield f"attribute:{name}", mean_score([float(bool(correct[place])) for place in own])


def _yes_no(wanted: Sequence[str], found: Sequence[str]) -> Iterator[tuple[str, Score]]:
    yes = np.array([[answer.lower() == "yes" for answer in answers] for answers in (wanted, found)])
    counts = np.stack([yes[0] & yes[1], ~yes[0] & yes[1], yes[0] & ~yes[1]], axis=1).astype(float)
    yield "yes_no_f1", resampled_score(counts, f1_of)
    yield "yes_share", mean_score(yes[1].astype(float))
