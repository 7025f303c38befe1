"""A trained model under lmms-eval, registered as ``aniso_mllm``; lmms-eval loads this module by its entry point.

Images of a task are embedded by the encoder of the target modality, and enter as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext.data import EncoderRecord
from aniso_ext.data.encoder import ENCODER_FILE
from aniso_ext.encode import Encoder
from aniso_ext.errors import DataError, InputError
from aniso_ext.mllm.evaluation.answers import IMAGE, generate_answers, score_answers
from aniso_ext.mllm.loading import load_trained
from aniso_ext.torchvision import prepare_torchvision

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

prepare_torchvision()
try:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise InputError(f"{error.name} is not installed: pip install 'aniso_ext[lmms]'") from None

NAME = "aniso_mllm"
LONGEST = 1024
"""Most tokens of an answer where a task does not say, as of lmms-eval's own models."""
_SEARCH = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_SAMPLING = ("temperature", "top_p", "top_k")
Document = tuple[str, str, Any]
"""Task, split and number of a document."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.AnisoMLLM")


@register_model(NAME)
class AnisoMLLM(lmms):
    """A trained model and the encoder of its images; arguments are those of ``--model_args``.

    Args:
        pretrained: folder that ``aniso train`` wrote.
        encoder: open_clip's name, as of ``aniso embed --model``; None for that of ``encoder.json`` in the folder, where
            its weights are published ones.
        encoder_pretrained, encoder_checkpoint: the encoder's weights, as of ``aniso embed``.
        device: such as ``cuda``; None for a GPU if there is one. Of several processes each takes its own.
        batch_size: questions, and images, at a time.
        max_batch_size: not used.

    Raises:
        InputError: no trained model, an encoder that cannot be loaded, is not named or is another one than the model
            was trained with, or an argument out of range.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        encoder: str | None = None,
        encoder_pretrained: str | None = None,
        encoder_checkpoint: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        from accelerate import Accelerator

        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1 or device is None
        self.device = self.accelerator.device if several else torch.device(str(device))
        model, self.tokenizer = load_trained(pretrained)
        self.model = model.to(self.device).eval()
        self.encoder = _load_encoder(Path(pretrained), encoder, encoder_pretrained, encoder_checkpoint, self.device)
        record, wanted = self.encoder.record, self.model.config.embedding_width
        if record.width != wanted:
            raise InputError(
                f"{record.name} makes embeddings of width {record.width}, but the model takes {wanted}: name the "
                "encoder that it was trained with"
            )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer to each question, cut at the first of its stop texts.

        Raises:
            DataError: a document without an image, or with more than one; the message names it.
        """
        documents = [_document(request, request.args[2:]) for request in requests]
        rows = self._embeddings(documents, [request.args[2] for request in requests])
        answers = [""] * len(requests)
        for longest, search, places in _alike([request.args[1] for request in requests]):
            found = generate_answers(
                self.model,
                self.tokenizer,
                rows[places],
                [_question(requests[place].args[0]) for place in places],
                batch_size=self.batch_size,
                max_new_tokens=longest,
                search=search,
            )
            for place, answer in zip(places, found, strict=True):
                context, options = requests[place].args[:2]
                answers[place] = _cut(answer, options.get("until"))
                self.cache_hook.add_partial("generate_until", (context, options), answers[place])
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each answer its loss by token, and whether greedy decoding gives it.

        lmms-eval takes the choice of the least value, so a loss is due, not a log-likelihood.

        Raises:
            DataError: as of :meth:`generate_until`.
        """
        documents = [_document(request, request.args[2:]) for request in requests]
        rows = self._embeddings(documents, [request.args[2] for request in requests])
        wanted = []
        for request, (task, split, number) in zip(requests, documents, strict=True):
            target = request.args[1]
            wanted.append(str(target(self.task_dict[task][split][number]) if callable(target) else target).strip())
        questions = [_question(request.args[0]) for request in requests]
        scored = score_answers(self.model, self.tokenizer, rows, questions, wanted, batch_size=self.batch_size)
        results = [(-each.total / each.tokens, each.greedy) for each in scored]
        for request, answer, result in zip(requests, wanted, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", (request.args[0], answer), result)
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: the model reads one image, in the first turn.

        Raises:
            InputError: always.
        """
        raise InputError(f"{NAME} answers one question about one image: leave tasks of several rounds out")

    def _embeddings(self, documents: Sequence[Document], finders: Sequence[Callable[[Any], Any]]) -> np.ndarray:
        """A row for each document, [n, D] float32; each document is embedded once."""
        places: dict[Document, int] = {}
        inverse = [places.setdefault(document, len(places)) for document in documents]
        finder = dict(zip(documents, finders, strict=True))
        distinct, rows = list(places), []
        for start in range(0, len(distinct), self.batch_size):
            images = [self._image(document, finder[document]) for document in distinct[start : start + self.batch_size]]
            batch = torch.stack([self.encoder.transform(image) for image in images])
            rows.append(self.encoder.encode_images(batch).numpy())
        empty = np.empty((0, self.encoder.record.width), np.float32)
        return np.concatenate([empty, *rows])[inverse]

    def _image(self, document: Document, finder: Callable[[Any], Any]) -> Any:
        from PIL.Image import Image

        task, split, number = document
        found = list(finder(self.task_dict[task][split][number]) or [])
        name = f"document {number} of {task} ({split})"
        if len(found) != 1:
            raise DataError(f"{name} has {len(found)} images: {NAME} answers questions about one; choose other tasks")
        if not isinstance(found[0], Image):
            raise DataError(f"{name} has a {type(found[0]).__name__} where an image is due: choose tasks of images")
        return found[0].convert("RGB")


def _load_encoder(
    folder: Path, name: str | None, pretrained: str | None, checkpoint: str | None, device: torch.device
) -> Encoder:
    path = folder / ENCODER_FILE
    record = EncoderRecord.read(path) if path.is_file() else None
    if name is None:
        if record is None or record.checkpoint is not None:
            lost = "names no published weights" if record is not None else "is not there"
            raise InputError(f"{path} {lost}: pass encoder=NAME, and encoder_pretrained=TAG or encoder_checkpoint=FILE")
        name, pretrained = record.model, record.pretrained
    encoder = Encoder.load(name, pretrained=pretrained, checkpoint=checkpoint, device=str(device))
    if record is not None and record.name != encoder.record.name:
        raise InputError(
            f"{folder} was trained on embeddings of {record.name}, but the encoder is {encoder.record.name}: name the "
            "encoder that it was trained with"
        )
    return encoder


def _document(request: Instance, place: Sequence[Any]) -> Document:
    if len(place) != 4:
        raise DataError(f"{request.task_name} asks without an image, as acc_mutual_info does: leave that metric out")
    _, number, task, split = place
    return str(task), str(split), number


def _question(context: str) -> str:
    """What is asked, the image before it as in training."""
    return context.replace(IMAGE, "").strip()


def _alike(options: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any], list[int]]]:
    """Requests of the same length and search, as (most tokens, options of ``generate``, places)."""
    groups: dict[str, tuple[int, dict[str, Any], list[int]]] = {}
    for place, given in enumerate(options):
        longest = int(given.get("max_new_tokens") or LONGEST)
        # lmms-eval writes greedy decoding as a temperature of 0
        temperature, asked = given.get("temperature"), given.get("do_sample")
        sampled = asked is not False and bool(asked if temperature is None else temperature)
        names = (*_SEARCH, *_SAMPLING) if sampled else _SEARCH
        search = {name: given[name] for name in names if given.get(name) is not None} | {"do_sample": sampled}
        groups.setdefault(f"{longest} {sorted(search.items())}", (longest, search, []))[2].append(place)
    return list(groups.values())


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            answer = answer.split(stop)[0]
    return answer.strip()
