"""An open_clip model as an encoder of both modalities, and the record that tells it apart from others."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.data import EncoderRecord
from aniso_ext.encode.library import open_clip
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import torch

LOCAL = "local-dir"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class Encoder:
    """Image tower, text tower, preprocessing and tokenizer of one open_clip model.

    Attributes:
        record: what ``encoder.json`` says of its embeddings.
        transform: PIL image to input [3, height, width] of the image tower.
        tokenizer: list of texts to token ids [n, context].
        precision: ``fp32``, ``bf16`` or ``fp16``; products run in it, the result is normalised in float32.
    """

    def __init__(
        self,
        model: Any,
        transform: Callable[[Any], torch.Tensor],
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        record: EncoderRecord,
        *,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.model, self.transform, self.tokenizer = model.eval(), transform, tokenizer
        self.record, self.device, self.precision = record, device, precision

    @classmethod
    def load(
        cls,
        model: str,
        *,
        pretrained: str | None = None,
        checkpoint: str | Path | None = None,
        device: str = "cpu",
        precision: str = "auto",
        seed: int = 0,
    ) -> Encoder:
        """An encoder by open_clip's name of it. Weights are downloaded only if ``pretrained`` or ``hf-hub:`` asks.

        Args:
            model: such as ``ViT-B-32``, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
            pretrained: open_clip's tag of weights; ``none`` takes random ones, a function of ``seed``.
            checkpoint: local file of weights instead, .safetensors or a PyTorch file; pickled code is refused.
            device: such as ``cuda``.
            precision: ``auto`` is bf16 on a GPU that has it, fp16 on another one, fp32 on the CPU.
            seed: of random weights.

        Raises:
            InputError: open_clip does not know the model or tag, or cannot load the weights, or torch cannot use the
                device; the message says why.
        """
        import torch

        library = open_clip()
        _check_source(library, model, pretrained, checkpoint)
        if precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        _check_device(device)
        tag = None if pretrained == "none" else pretrained
        try:
            with torch.random.fork_rng(devices=[]), _quiet() if pretrained == "none" else nullcontext():
                torch.manual_seed(seed)
                # towers of other libraries start from random weights as well, not from a download
                built = library.create_model(
                    model,
                    pretrained=str(checkpoint) if checkpoint else tag,
                    device="cpu",
                    pretrained_text=False,
                    require_pretrained=pretrained != "none",
                )
            tokenizer = library.get_tokenizer(model)
        except Exception as error:  # open_clip lets through what its many loaders raise
            what = f"{model} with {checkpoint or pretrained or 'its weights'}"
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"open_clip cannot load {what}: {type(error).__name__}: {reason}") from None
        preprocessing = library.transform.PreprocessCfg(**built.visual.preprocess_cfg)
        transform = library.transform.image_transform_v2(preprocessing, is_train=False)
        size = _pair(preprocessing.size)
        by_tag = tag is not None or model.startswith("hf-hub:")
        record = make_record(built, model, tag, _width(built, tokenizer), size, by_tag=by_tag)
        chosen = _precision(device) if precision == "auto" else precision
        return cls(built.to(device), transform, tokenizer, record, device=device, precision=chosen)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit rows [n, D] float32, on the CPU, of preprocessed images [n, 3, height, width]."""
        return self._encode(self.model.encode_image, images)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit rows [n, D] float32, on the CPU, of token ids [n, context]."""
        return self._encode(self.model.encode_text, tokens)

    def _encode(self, tower: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        import torch

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        moved = batch.to(self.device, non_blocking=True)
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None):
            features = tower(moved)
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def make_record(
    model: Any, name: str, tag: str | None, width: int, image_size: tuple[int, int], *, by_tag: bool = False
) -> EncoderRecord:
    """The record of a loaded model: published weights are named by their tag, local and random ones by their hash."""
    scheme, _, _ = name.partition(":")
    label = LOCAL if scheme == LOCAL else name
    digest = None if by_tag else weights_hash(model.state_dict())
    weights = tag if digest is None else f"sha256:{digest[:16]}"
    return EncoderRecord(
        name=label if weights is None else f"{label} {weights}",
        model=label,
        pretrained=tag,
        checkpoint=digest,
        width=width,
        normalised=True,
        image_size=image_size,
        library=f"open_clip {open_clip().__version__}",
    )


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes: the same whatever file the weights came from."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}:{value.dtype}:{list(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_source(library: Any, model: str, pretrained: str | None, checkpoint: str | Path | None) -> None:
    named_place = model.startswith(("local-dir:", "hf-hub:"))
    if pretrained is not None and checkpoint is not None:
        raise InputError("pretrained and checkpoint exclude each other: name one source of weights")
    if named_place:
        if pretrained is not None or checkpoint is not None:
            raise InputError(f"{model} brings its own weights: leave pretrained and checkpoint out")
        return
    if model not in library.list_models():
        raise InputError(f"open_clip has no model {model!r}: it has {', '.join(library.list_models())}")
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.is_file():
            raise InputError(f"{path} is not a file: pass the file of weights")
        if path.suffix not in WEIGHT_SUFFIXES:
            raise InputError(f"{path} has the unknown suffix {path.suffix!r}: use {', '.join(WEIGHT_SUFFIXES)}")
    elif pretrained is None:
        raise InputError(f"no weights named for {model}: pass a tag as pretrained, or a file as checkpoint")
    elif pretrained != "none":
        tags = library.list_pretrained_tags_by_model(model)
        if pretrained not in tags:
            known = ", ".join(tags) or "none"
            raise InputError(f"open_clip has no weights {pretrained!r} for {model}: it has {known}")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"torch cannot use device {device!r}: {str(error).splitlines()[0]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights, which have been asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _width(model: Any, tokenizer: Callable[[Sequence[str]], torch.Tensor]) -> int:
    import torch

    with torch.inference_mode():
        return int(model.encode_text(tokenizer([""])).shape[-1])


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _precision(device: str) -> str:
    import torch

    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
