"""A small dual encoder of open_clip's classes, trained contrastively on fresh scenes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.encode.library import open_clip
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import torch

    from aniso_ext.data import EncoderRecord
    from aniso_ext.worlds.shapes.world import ShapesWorld

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""The names by which open_clip knows a model in a folder (``local-dir:FOLDER``)."""
_GREY = 0.5
_EMBED_ROWS = 250
_WARM_UP_STEPS = 30


@dataclass(frozen=True)
class DualEncoderOptions:
    """Size and training of the encoder; the defaults train in about two minutes on one CPU core."""

    width: int = 128
    image_width: int = 16
    text_width: int = 128
    text_layers: int = 1
    context_length: int = 48
    steps: int = 300
    batch_rows: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    logit_scale: float = 60.0
    seed: int = 0

    def model_config(self, image_size: int) -> dict[str, Any]:
        """open_clip's ``model_cfg``: a ResNet with attention pooling, and a transformer over CLIP's own tokens."""
        return {
            "embed_dim": self.width,
            "init_logit_scale": math.log(self.logit_scale),
            "vision_cfg": {
                "image_size": image_size,
                "layers": [1, 1, 1, 1],
                "width": self.image_width,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": 49408,
                "width": self.text_width,
                "heads": max(1, self.text_width // 16),
                "layers": self.text_layers,
            },
        }


class DualEncoder:
    """An open_clip model with its tokenizer.

    ``embed_images`` and ``embed_texts`` give unit rows [N, width] float32; ``save`` writes a folder that open_clip, and
    so ``aniso embed --model local-dir:FOLDER``, can load.
    """

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        library = open_clip()
        self.model, self.config = model.eval(), config
        self.tokenizer = library.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])

    @property
    def width(self) -> int:
        return int(self.config["embed_dim"])

    def embed_images(self, pictures: np.ndarray) -> np.ndarray:
        """Unit rows [N, width] of pictures [N, size, size, 3] uint8."""
        import torch

        with torch.inference_mode():
            parts = [
                self.model.encode_image(pixels(pictures[first : first + _EMBED_ROWS]), normalize=True)
                for first in range(0, len(pictures), _EMBED_ROWS)
            ]
        return torch.cat(parts).numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows [N, width] of texts."""
        import torch

        with torch.inference_mode():
            parts = [
                self.model.encode_text(self.tokenizer(list(texts[first : first + _EMBED_ROWS])), normalize=True)
                for first in range(0, len(texts), _EMBED_ROWS)
            ]
        return torch.cat(parts).numpy()

    def save(self, folder: str | Path) -> Path:
        """Write ``open_clip_config.json`` and ``open_clip_model.safetensors``."""
        from safetensors.torch import save

        from aniso_ext.data.whole_file import replace_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        preprocessing = {"mean": [_GREY] * 3, "std": [_GREY] * 3, "interpolation": "bicubic"}
        config = {"model_cfg": self.config, "preprocess_cfg": preprocessing}
        tensors = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> DualEncoder:
        """What ``save`` wrote."""
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / CONFIG).read_text())["model_cfg"]
        model = open_clip().model.CLIP(**config)
        model.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return cls(model, config)

    def record(self) -> EncoderRecord:
        """What ``encoder.json`` says of its embeddings, the same as for ``aniso embed --model local-dir:FOLDER``."""
        from aniso_ext.encode.encoder import LOCAL, make_record

        size = int(self.config["vision_cfg"]["image_size"])
        return make_record(self.model, LOCAL, None, self.width, (size, size))


def pixels(pictures: np.ndarray) -> torch.Tensor:
    """Pictures [N, size, size, 3] uint8 as the image tower's input, [N, 3, size, size] in [-1, 1]."""
    import torch

    if pictures.ndim != 4 or pictures.dtype != np.uint8:
        raise InputError(f"pictures must be uint8 [N, size, size, 3], got {pictures.dtype} {list(pictures.shape)}")
    # a view of rows of pixels: channels stay last in memory, which the convolutions prefer
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255).sub_(_GREY).div_(_GREY)


def train_dual_encoder(
    world: ShapesWorld,
    *,
    options: DualEncoderOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DualEncoder:
    """Train image and text tower together by open_clip's contrastive loss; each step sees scenes that no other did.

    Args:
        world: where scenes come from; the stream is one that no split of the world uses.
        options: sizes and schedule.
        progress: called with (step, steps).

    Returns:
        The trained encoder; the same to the bit for the same options on the same machine and number of threads.
    """
    import torch

    chosen = options or DualEncoderOptions()
    model, config = _new_model(chosen, world.size)
    encoder = DualEncoder(model, config)
    model.visual.to(memory_format=torch.channels_last)
    model.train()
    loss_of = open_clip().ClipLoss()
    optimiser = _optimiser(model, chosen)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, chosen.steps))
    for step, (pictures, texts) in enumerate(_batches(world, chosen)):
        images = model.encode_image(pixels(pictures), normalize=True)
        captions = model.encode_text(encoder.tokenizer(texts), normalize=True)
        loss = loss_of(images, captions, model.logit_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if progress is not None:
            progress(step + 1, chosen.steps)
    model.visual.to(memory_format=torch.contiguous_format)
    model.eval()
    return encoder


def untrained_dual_encoder(world: ShapesWorld, *, options: DualEncoderOptions | None = None) -> DualEncoder:
    """The encoder that :func:`train_dual_encoder` starts from."""
    return DualEncoder(*_new_model(options or DualEncoderOptions(), world.size))


def _new_model(options: DualEncoderOptions, image_size: int) -> tuple[Any, dict[str, Any]]:
    import torch

    config = options.model_config(image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return open_clip().model.CLIP(**config), config


def _optimiser(model: Any, options: DualEncoderOptions) -> torch.optim.Optimizer:
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / _WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(world: ShapesWorld, options: DualEncoderOptions) -> Iterator[tuple[np.ndarray, list[str]]]:
    for step in range(options.steps):
        scenes = world.scenes(options.batch_rows, split="encoder", start=step * options.batch_rows)
        yield np.stack([world.render(scene) for scene in scenes]), [world.captions(scene)[0] for scene in scenes]
