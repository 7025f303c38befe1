"""The contract that every alignment method keeps."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from aniso_ext.align.rows import Rows, are_unit, open_rows
from aniso_ext.errors import InputError, NotFittedError

if TYPE_CHECKING:
    from aniso_ext.align.rows import Embeddings

Self = TypeVar("Self", bound="Aligner")
Arrays = dict[str, torch.Tensor]
Fields = Mapping[str, tuple[str, ...]]
CALIBRATIONS = ("auto", "fitted", "corpus", None)


class Aligner:
    """Maps rows of a source modality to stand-ins for a target modality, row by row once it is fitted.

    A method derives from this class, registers itself with :func:`aniso_ext.align.register`, names its fitted arrays
    in ``fields`` and writes ``_fit`` and ``_apply``. The habits are those of scikit-learn: ``__init__`` only stores
    its keyword options, ``fit`` returns the aligner, fitted attributes end in an underscore, ``get_params`` and
    ``set_params`` work.

    Fitted attributes common to all: ``width_`` (D, also ``n_features_in_``), ``corpora_`` (rows and fingerprint of
    both sides, and whether they are unit rows), ``summary_`` (numbers of the fit), ``encoder_`` (name of the encoder,
    where a saved aligner has one) and one tensor per entry of ``fields``, its name plus an underscore.
    """

    method: ClassVar[str] = ""
    baseline: ClassVar[bool] = True
    """False for the methods that this package is about."""
    fields: ClassVar[Fields] = {}
    """Array name -> symbolic shape, e.g. ``("D", "R")``; the same letter is the same size."""
    optional_fields: ClassVar[frozenset[str]] = frozenset()
    field_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    """Stored dtype where it is not float64."""
    transform_options: ClassVar[tuple[str, ...]] = ()
    """Options that change what a fitted aligner does: they are part of the fingerprint."""
    option_types: ClassVar[Mapping[str, type]] = {}
    """Options that are dataclasses, saved as the mapping of their fields."""
    part_prefixes: ClassVar[tuple[str, ...]] = ()
    """How names of arrays begin that belong to parts of the method; ``_check_arrays`` checks them, shapes included."""
    runtime_options: ClassVar[tuple[str, ...]] = ()
    """Options of the machine, not of the method: never saved."""
    tile_bytes: ClassVar[int | None] = 1 << 20
    """Rows for one call of ``transform_batch``: what its steps hold stays small, and they are long enough for many
    threads not to wait for the interpreter; None if the method takes any number of rows in one step."""

    width_: int
    n_features_in_: int
    corpora_: dict[str, dict[str, Any]]
    summary_: dict[str, Any]
    encoder_: str | None = None

    # What a method provides

    def _check_options(self) -> None:
        """Raise :class:`InputError` if an option has an impossible value."""

    def _fit(self, source: Rows, target: Rows) -> tuple[Arrays, dict[str, Any]]:
        """Fitted arrays (keys of ``fields`` and of parts) and the numbers of :meth:`summary`."""
        raise NotImplementedError(f"{type(self).__name__} must define _fit")

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Stand-ins [n, D] for rows [n, D], which are float32 or float64."""
        raise NotImplementedError(f"{type(self).__name__} must define _apply")

    def _corpus_sums(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        """Float64 column sums [D] of what pass ``number`` of a corpus calibration takes the mean of (METHOD D17)."""
        raise NotImplementedError(f"{type(self).__name__} must define _corpus_sums")

    def _corpus_arrays(self, mean: torch.Tensor, number: int) -> Arrays:
        """Arrays that follow from the float64 mean [D] of pass ``number``."""
        raise NotImplementedError(f"{type(self).__name__} must define _corpus_arrays")

    def _uncalibrated(self: Self) -> Self:
        """This aligner without its last calibration."""
        twin = copy.copy(self)
        for name in self.optional_fields:
            twin.__dict__.pop(f"{name}_", None)
        return twin

    def _check_arrays(self, arrays: Arrays) -> None:
        """Raise :class:`InputError` if loaded arrays, of the right shapes and finite, cannot belong to this method."""

    # What a user calls

    def fit(self: Self, source: Embeddings, target: Embeddings) -> Self:
        """Fit on two unpaired sets.

        Args:
            source: [N_s, D] embeddings of the source modality: array, tensor, embedding set, or the path of a file or
                folder, which is streamed.
            target: [N_t, D] embeddings of the target modality, any number of rows, in any order.

        Returns:
            The aligner itself.

        Raises:
            InputError: widths differ, fewer than two rows, non-finite values, or an impossible option.
            DataError: a path that holds no usable embeddings.
        """
        return self._fit_on(source, target)

    def _fit_on(self: Self, source: Embeddings, target: Embeddings, **run: Any) -> Self:
        """What :meth:`fit` does; ``run`` goes to the ``_fit`` of a method that takes more than the rows."""
        self._check_options()
        source_rows, target_rows = open_rows(source, "source"), open_rows(target, "target")
        if source_rows.width != target_rows.width:
            raise InputError(
                f"source has width {source_rows.width} and target {target_rows.width}: "
                "both must come from one contrastive space"
            )
        for rows in (source_rows, target_rows):
            if rows.count < 2 or rows.width < 1:
                raise InputError(
                    f"{rows.name} is [{rows.count}, {rows.width}]: fitting needs at least 2 rows and 1 column"
                )
        arrays, summary = self._fit(source_rows.shared(), target_rows.shared(), **run)
        self._install(arrays, source_rows.width)
        self.corpora_ = {
            rows.name: {"rows": rows.count, "fingerprint": rows.fingerprint(), "unit_rows": are_unit(rows)}
            for rows in (source_rows, target_rows)
        }
        self.summary_ = summary
        return self

    def transform(self, source: Embeddings, *, calibration: str | None = "auto") -> Any:
        """Stand-ins for source rows.

        Args:
            source: [N, D] array, tensor, embedding set or path; N may be 0.
            calibration: ``fitted`` uses constants of the fit, so that each row's result depends on that row alone;
                ``corpus`` first takes the corpus mean from ``source`` itself (METHOD D17); None leaves the last
                calibration off; ``auto`` is what the aligner was made with. Methods that have no such mean ignore it.

        Returns:
            [N, D] of the same kind: array for an array or a path, tensor for a tensor; same dtype and device.

        Raises:
            NotFittedError: ``fit`` was not called.
            InputError: the width differs from the fitted one (both are named), or the dtype does not fit.
        """
        self._check_fitted()
        rows = open_rows(source, "source")
        self._check_width(rows)
        aligner = self.calibrated(rows, calibration=calibration)
        if isinstance(source, torch.Tensor):
            parts = [aligner.transform_batch(batch) for batch in rows.batches()]
            return torch.cat(parts) if parts else source.new_empty((0, rows.width))
        result: np.ndarray | None = None
        start = 0
        for batch in rows.batches():
            part = aligner.transform_batch(batch).numpy()
            result = np.empty((rows.count, rows.width), part.dtype) if result is None else result
            result[start : start + len(part)] = part
            start += len(part)
        return np.empty((0, rows.width), getattr(source, "dtype", np.float32)) if result is None else result

    def fit_transform(self, source: Embeddings, target: Embeddings) -> Any:
        """``fit(source, target)`` and then ``transform(source)``."""
        return self.fit(source, target).transform(source)

    def transform_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Stand-ins [n, D] for one batch [n, D] with the fitted constants; dtype and device are kept."""
        working = torch.float64 if batch.dtype == torch.float64 else torch.float32
        return self._apply(batch.to(working)).to(batch.dtype)

    def calibrated(self: Self, source: Embeddings | Rows, *, calibration: str | None = "auto") -> Self:
        """The aligner that :meth:`transform` would use on this corpus; see there for ``calibration``."""
        if calibration not in CALIBRATIONS:
            raise InputError(f"calibration must be 'auto', 'fitted', 'corpus' or None, got {calibration!r}")
        if calibration == "auto":
            calibration = self._own_calibration()
        if calibration == "corpus":
            return self.calibrate_on(source)
        if calibration is None:
            return self._uncalibrated()
        missing = sorted(self.optional_fields - set(self._arrays()))
        if missing:
            raise InputError(
                f"this {type(self).__name__} holds no {', '.join(missing)}: transform with calibration='corpus', "
                "or fit with calibration='fitted'"
            )
        return self

    def calibrate_on(self: Self, source: Embeddings | Rows) -> Self:
        """A copy whose corpus means come from ``source``; the aligner itself if the method has none (METHOD D17).

        The copy transforms batch by batch what ``transform(source, calibration="corpus")`` transforms at once.
        """
        self._check_fitted()
        rows = open_rows(source, "source")
        self._check_width(rows)
        if rows.count == 0:
            return self
        aligner = self
        for number in range(self.corpus_passes):
            total = torch.zeros(self.width_, dtype=torch.float64)
            for batch in rows.exact_batches():
                total += aligner._corpus_sums(batch, number)
            aligner = aligner.with_corpus_mean(total / rows.count, number)
        return aligner

    @property
    def corpus_passes(self) -> int:
        """Passes over a corpus that its calibration takes; 0 for a method that has no corpus mean."""
        return 0

    def corpus_sums(self, batch: np.ndarray | torch.Tensor, number: int = 0) -> np.ndarray:
        """What one batch adds to a pass of a corpus calibration: float64 column sums [D] (METHOD D17).

        Sums of batches add up in any grouping; their total over the number of rows is the mean that
        :meth:`with_corpus_mean` takes. So a corpus can be calibrated on in parts, by many processes.

        Args:
            batch: [n, D] rows, on any device.
            number: of the pass, from 0 to ``corpus_passes`` - 1. Each pass needs the aligner that the one before gave.

        Raises:
            InputError: the shape or dtype does not fit, or the method has no such pass.

        Example:
            >>> import numpy as np, aniso_ext as aniso
            >>> rows = np.eye(2)
            >>> aligner = aniso.make_aligner("unicorn").fit(rows, rows)
            >>> mean = (aligner.corpus_sums(rows[:1]) + aligner.corpus_sums(rows[1:])) / 2
            >>> aligner.with_corpus_mean(mean).transform(rows).tolist()
            [[0.5, -0.5], [-0.5, 0.5]]
        """
        self._check_fitted()
        self._check_pass(number)
        rows = open_rows(batch, "batch")
        self._check_width(rows)
        total = torch.zeros(self.width_, dtype=torch.float64)
        for part in rows.batches(max(1, rows.count)):
            total += self._corpus_sums(part, number).cpu()
        return total.numpy()

    def with_corpus_mean(self: Self, mean: np.ndarray | torch.Tensor, number: int = 0) -> Self:
        """A copy that holds the mean [D] of pass ``number`` over a corpus; see :meth:`corpus_sums`."""
        self._check_fitted()
        self._check_pass(number)
        value = torch.as_tensor(mean, dtype=torch.float64).cpu()
        if tuple(value.shape) != (self.width_,) or not bool(torch.isfinite(value).all()):
            raise InputError(f"the corpus mean must be finite [{self.width_}], got {list(value.shape)}")
        twin = copy.copy(self)
        twin._install({**self._arrays(), **self._corpus_arrays(value, number)}, self.width_)
        twin._pin("fitted")
        return twin

    @property
    def width(self) -> int:
        """D, the embedding width that was fitted."""
        self._check_fitted()
        return self.width_

    def summary(self) -> str:
        """The numbers of the fit as readable lines: rows, gap of the means and what the method adds."""
        self._check_fitted()
        lines = [f"{self!r} fitted at width {self.width_}"]
        for side, corpus in self.corpora_.items():
            lines.append(f"  {side} rows: {corpus['rows']}")
        for name, value in self.summary_.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            lines.append(f"  {name.replace('_', ' ')}: {shown}")
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what :meth:`transform` returns: method, options and arrays."""
        self._check_fitted()
        options = {name: getattr(self, name) for name in self.transform_options}
        digest = hashlib.sha256(json.dumps([self.method, options], sort_keys=True, default=plain).encode())
        for name, value in sorted(self._arrays().items()):
            digest.update(f"{name}:{value.dtype}:{list(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path, *, encoder: str | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (DESIGN section 4); an older artefact there is replaced.

        Args:
            folder: made if it is not there.
            encoder: name of the encoder whose embeddings these are; a conversion refuses files that name another one.
                By default that of the folder which the aligner was loaded from.

        Returns:
            The folder.
        """
        from aniso_ext.align.artefact import save

        return save(self, Path(folder), encoder=encoder)

    @classmethod
    def from_pretrained(cls: type[Self], folder: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote, with every shape and value checked.

        Raises:
            ArtefactError: a file is missing or damaged, or holds another method; the message names the field.
        """
        from aniso_ext.align.artefact import load

        return load(Path(folder), cls)

    # scikit-learn's parameter protocol

    @classmethod
    def parameter_names(cls) -> list[str]:
        """Names of the keyword options, in the order of ``__init__``."""
        if cls.__init__ is object.__init__:
            return []
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The options by name, as given."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    def set_params(self: Self, **options: Any) -> Self:
        """Change options; an unknown name is an :class:`InputError`."""
        known = self.parameter_names()
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InputError(
                f"{type(self).__name__} has no option {', '.join(unknown)}: it takes {', '.join(known) or 'none'}"
            )
        for name, value in options.items():
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "width_")

    def __repr__(self) -> str:
        defaults = (
            {name: parameter.default for name, parameter in inspect.signature(type(self).__init__).parameters.items()}
            if self.parameter_names()
            else {}
        )
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    # What the methods share

    def _own_calibration(self) -> str | None:
        return "fitted"

    def _pin(self, calibration: str | None) -> None:
        """Make the options of a recalibrated copy say which calibration its arrays hold."""

    def _install(self, arrays: Arrays, width: int) -> None:
        for name, value in arrays.items():
            setattr(self, f"{name}_", value)
        self.width_ = self.n_features_in_ = width

    def _arrays(self) -> Arrays:
        return {name: value for name in self.fields if (value := getattr(self, f"{name}_", None)) is not None}

    def _constant(self, name: str, like: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = getattr(self, f"{name}_")
        return value.to(device=like.device, dtype=like.dtype)

    def _check_fitted(self) -> None:
        if not hasattr(self, "width_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit(source, target) first")

    def _check_pass(self, number: int) -> None:
        if not 0 <= number < self.corpus_passes:
            raise InputError(
                f"{type(self).__name__} has {self.corpus_passes} passes over a corpus: there is no pass {number}"
            )

    def _check_width(self, rows: Rows) -> None:
        if rows.width != self.width_:
            raise InputError(
                f"{rows.name} has width {rows.width}, but this {type(self).__name__} was fitted at width "
                f"{self.width_}: use embeddings of the encoder it was fitted on"
            )


def plain(value: Any) -> Any:
    """NumPy numbers and dataclasses as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise InputError(f"an option of type {type(value).__name__} cannot be written as JSON: {value!r}")
