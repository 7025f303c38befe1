"""A fitted aligner as ``config.json`` + ``model.safetensors``, and every check on the way back (DESIGN section 4)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import aniso_ext
from aniso_ext.align.base import Aligner, Arrays, plain
from aniso_ext.align.registry import aligner_class
from aniso_ext.errors import ArtefactError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = "aniso_ext.aligner"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no arrays of trained parts."""
CONFIG = "config.json"
MODEL = "model.safetensors"
_AGAIN = "copy or save the aligner again"

AnyAligner = TypeVar("AnyAligner", bound=Aligner)


def save(aligner: Aligner, folder: Path, *, encoder: str | None) -> Path:
    """Write both files, each through a temporary file in the folder and a rename."""
    from safetensors.torch import save as serialize

    fingerprint = aligner.fingerprint()
    options = {name: value for name, value in aligner.get_params().items() if name not in aligner.runtime_options}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": aniso_ext.__version__,
        "method": aligner.method,
        "options": options,
        "width": aligner.width,
        "encoder": aligner.encoder_ if encoder is None else encoder,
        "normalisation": "l2" if aligner.corpora_.get("source", {}).get("unit_rows", True) else "none",
        "corpora": aligner.corpora_,
        "summary": aligner.summary_,
        "fingerprint": fingerprint,
    }
    tensors = {name: value.contiguous() for name, value in aligner._arrays().items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / MODEL, serialize(tensors, metadata={"format": "pt", "fingerprint": fingerprint}))
    _write(folder / CONFIG, (json.dumps(config, indent=2, default=plain) + "\n").encode())
    return folder


def load(folder: Path, wanted: type[AnyAligner]) -> AnyAligner:
    """The aligner that :func:`save` wrote, of class ``wanted`` (``Aligner`` takes any method)."""
    config = _read_config(folder)
    method = _field(config, "method", str)
    cls = _checked("method", lambda: aligner_class(method))
    if not issubclass(cls, wanted):
        raise ArtefactError(f"{folder}: method is {method!r}, which {wanted.__name__} cannot load: use load_aligner")
    options = _field(config, "options", dict)
    unknown = sorted(set(options) - set(cls.parameter_names()))
    if unknown:
        raise ArtefactError(f"{folder}: options has {unknown}, which {method} does not take: {_AGAIN}")
    aligner = cls(**_restored(options, cls))
    _checked("options", aligner._check_options)
    width = _field(config, "width", int)
    if width < 1:
        raise ArtefactError(f"{folder}: width must be positive, got {width}: {_AGAIN}")
    arrays = _read_arrays(folder / MODEL, cls)
    _check_shapes(arrays, cls, width)
    _checked("arrays", lambda: aligner._check_arrays(arrays))
    aligner._install(arrays, width)
    aligner.corpora_ = _field(config, "corpora", dict)
    aligner.encoder_ = None if config.get("encoder") is None else _field(config, "encoder", str)
    aligner.summary_ = _field(config, "summary", dict)
    if aligner.fingerprint() != _field(config, "fingerprint", str):
        reason = f"fingerprint does not match: {CONFIG} and {MODEL} differ or were changed"
        raise ArtefactError(f"{folder}: {reason}: {_AGAIN}")
    return aligner


def load_aligner(folder: str | Path) -> Aligner:
    """A saved aligner of any method (DESIGN section 4).

    Args:
        folder: what ``save_pretrained`` wrote.

    Raises:
        ArtefactError: a file is missing or damaged, or an option, shape, dtype or value does not fit; the message names
            the field.

    Example:
        >>> import tempfile, numpy as np, aniso_ext as aniso
        >>> aligner = aniso.make_aligner("mean_shift").fit(np.eye(4), -np.eye(4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = aniso.load_aligner(aligner.save_pretrained(folder))
        >>> again.fingerprint() == aligner.fingerprint()
        True
    """
    return load(Path(folder), Aligner)


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no {CONFIG}: name a folder that save_pretrained or `aniso fit` wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path} is not JSON ({error}): save the aligner again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ArtefactError(f"{path}: format is not {FORMAT!r}: this is not an aligner of this package")
    version = config.get("format_version")
    if version not in READABLE_VERSIONS:
        readable = " and ".join(str(number) for number in READABLE_VERSIONS)
        reason = f"format_version is {version!r}, this version of aniso_ext reads {readable}"
        raise ArtefactError(f"{path}: {reason}: install another")
    return config


def _field(config: Mapping[str, Any], name: str, kind: type) -> Any:
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArtefactError(f"{CONFIG}: {name} must be of type {kind.__name__}, got {value!r}: {_AGAIN}")
    return value


def _checked(name: str, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except (InputError, TypeError) as error:
        raise ArtefactError(f"the artefact's {name}: {error}: {_AGAIN}") from None


def _restored(options: dict[str, Any], cls: type[Aligner]) -> dict[str, Any]:
    """The options with dataclasses made of their mappings."""
    restored = dict(options)
    for name, kind in cls.option_types.items():
        if isinstance(value := options.get(name), dict):
            restored[name] = _checked(f"options.{name}", partial(kind, **value))
    return restored


def _read_arrays(path: Path, cls: type[Aligner]) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtefactError(f"{path.parent} holds no {MODEL}: copy both files of the aligner")
    try:
        # Copies are aligned in memory and outlive the file: sums come out as they did before saving.
        arrays: Arrays = {name: value.clone() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{path} is damaged ({reason}): {_AGAIN}") from None
    missing = sorted(set(cls.fields) - cls.optional_fields - set(arrays))
    unknown = sorted(name for name in set(arrays) - set(cls.fields) if not name.startswith(cls.part_prefixes))
    if missing or unknown:
        raise ArtefactError(f"{path}: missing arrays {missing or 'none'}, unknown arrays {unknown or 'none'}: {_AGAIN}")
    return arrays


def _check_shapes(arrays: Arrays, cls: type[Aligner], width: int) -> None:
    sizes = {"D": width, "1": 1}
    for name in sorted(set(arrays) & set(cls.fields)):
        value, letters = arrays[name], cls.fields[name]
        wanted = cls.field_dtypes.get(name, torch.float64)
        if value.dtype != wanted:
            raise ArtefactError(f"{MODEL}: {name} is {value.dtype}, expected {wanted}: {_AGAIN}")
        if value.dim() != len(letters) or not all(
            size in (1, width) if letter == "1 or D" else size == sizes.setdefault(letter, size)
            for letter, size in zip(letters, value.shape, strict=True)
        ):
            known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes and letter != "1")
            raise ArtefactError(
                f"{MODEL}: {name} has shape {list(value.shape)}, expected [{', '.join(letters)}]"
                + (f" with {known}" if known else "")
                + f": {_AGAIN}"
            )
        if value.numel() == 0:
            raise ArtefactError(f"{MODEL}: {name} is empty: {_AGAIN}")
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ArtefactError(f"{MODEL}: {name} has {bad} non-finite values: {_AGAIN}")
