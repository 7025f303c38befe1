"""Evaluation of a trained model on real target embeddings: captions, questions, predictions."""

from aniso_ext.mllm.evaluation.answers import generate_answers, score_choices
from aniso_ext.mllm.evaluation.captions import bleu, cider_d, words
from aniso_ext.mllm.evaluation.evaluate import evaluate
from aniso_ext.mllm.evaluation.questions import Question, read_questions
from aniso_ext.mllm.evaluation.scores import EvaluationReport, Score

__all__ = [
    "EvaluationReport",
    "Question",
    "Score",
    "bleu",
    "cider_d",
    "evaluate",
    "generate_answers",
    "read_questions",
    "score_choices",
    "words",
]
