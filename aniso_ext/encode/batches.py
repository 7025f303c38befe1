"""Samples as batches for the encoder, decoded and tokenized by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aniso_ext.encode.inputs import Samples

if TYPE_CHECKING:
    import torch


class Batch(NamedTuple):
    """Usable rows of the input, with what the towers take, and the rows that are bad: row to reason."""

    rows: list[int]
    images: torch.Tensor | None
    tokens: torch.Tensor | None
    sizes: list[tuple[int, int]]
    bad: dict[int, str]


class Decoding:
    """A map-style data set for torch's loader: a list of rows gives their :class:`Batch`."""

    def __init__(
        self,
        samples: Samples,
        transform: Callable[[Any], torch.Tensor],
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
    ) -> None:
        self.samples, self.transform, self.tokenizer = samples, transform, tokenizer

    def __getitem__(self, rows: list[int]) -> Batch:
        import torch

        usable: list[int] = []
        pictures: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        bad: dict[int, str] = {}
        for row in rows:
            if (reason := self._caption_fault(row)) is not None:
                bad[row] = reason
                continue
            if self.samples.images is not None:
                image = _decode(self.samples, row)
                if isinstance(image, str):
                    bad[row] = image
                    continue
                sizes.append(image.size)
                pictures.append(self.transform(image))
            usable.append(row)
        images = torch.stack(pictures) if pictures else None
        tokens = None
        if self.samples.captions is not None and usable:
            tokens = self.tokenizer([str(self.samples.captions[row]) for row in usable])
        return Batch(usable, images, tokens, sizes, bad)

    def _caption_fault(self, row: int) -> str | None:
        if self.samples.captions is None:
            return None
        caption = self.samples.captions[row]
        if caption is None:
            return "no caption"
        return None if caption.strip() else "empty caption"


def load_batches(
    decoding: Decoding, batches: Sequence[list[int]], *, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The batches in order, decoded ahead by worker processes; with 0 workers by this one."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        decoding,  # type: ignore[arg-type]
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
    )
    yield from loader


def _start_worker(_: int) -> None:
    """Leave signals of the terminal to the parent, and the cores to the other workers."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _decode(samples: Samples, row: int) -> Any:
    """The picture of a row in RGB, or why there is none."""
    from PIL import Image

    assert samples.images is not None
    if samples.images[row] is None:
        return "no image path"
    path = samples.image_path(row)
    if not path.is_file():
        return "file is missing"
    if path.stat().st_size == 0:
        return "file is empty"
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        return f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
