"""Stand-ins on the fly: what happens to source embeddings between the file and the projector, in training."""

from __future__ import annotations

import copy
import hashlib
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aniso_ext.errors import InputError
from aniso_ext.ops import Frame, decode, encode

if TYPE_CHECKING:
    from aniso_ext.align import Aligner, AnisoAlign
    from aniso_ext.align.neighbours import NeighbourMean

NOISE_SHAPES = ("isotropic", "residual")


class Correction(nn.Module):
    """Rows [n, D] to unit rows [n, D]: an aligner, then the mean of target rows near the stand-in, then noise.

    Constants of an aligner are no buffers on purpose: a model that is cast to bfloat16 would round them. Only a refiner
    that is trained has parameters here.

    Args:
        aligner: fitted; None leaves the rows as they are.
        noise_std: z <- Norm(z + N(0, noise_std^2)), drawn from torch's global generator at every call, so that a
            training state carries it.
        noise_factor: [D, D] F, for noise_std F g with g standard normal instead, see
            :func:`aniso_ext.align.residual.noise_factor`; None is isotropic.
        neighbours: takes the place of each stand-in, see :class:`aniso_ext.align.neighbours.NeighbourMean`.
        trainable: the refiner of an AnisoAlign takes gradients.

    Attributes:
        width: D of the aligner, or None.
        fingerprint: of the aligner, the neighbours and the noise, or None where rows stay as they are.

    Raises:
        InputError: an impossible noise or factor, ``trainable`` with an aligner that has no refiner or with neighbours,
            through which no gradient passes, or neighbours of another width.

    Example:
        >>> import torch
        >>> Correction.noise(0.1)(torch.eye(4)).norm(dim=1).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        noise_std: float = 0.0,
        noise_factor: torch.Tensor | None = None,
        neighbours: NeighbourMean | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= noise_std < float("inf"):
            raise InputError(f"noise_std must be finite and not negative, got {noise_std!r}")
        self.aligner, self.noise_std = aligner, float(noise_std)
        self.width = None if aligner is None else aligner.width
        self.noise_factor = _checked_factor(noise_factor, self.width) if self.noise_std else None
        self.neighbours = _checked_neighbours(neighbours, self.width, trainable)
        if neighbours is not None:
            self.width = neighbours.width
        self.fingerprint = _fingerprint(aligner, neighbours, self.noise_std, self.noise_factor)
        self.refined: RefinedCorrection | None = None
        if trainable:
            self.refined = RefinedCorrection(_with_refiner(aligner))

    @classmethod
    def from_aligner(
        cls,
        aligner: Aligner | str | PathLike[str],
        *,
        source: Any = None,
        target: Any = None,
        noise_std: float = 0.0,
        noise_factor: torch.Tensor | None = None,
        noise_shape: str = "isotropic",
        neighbours: int = 0,
        trainable: bool = False,
    ) -> Correction:
        """A correction by an aligner: a fitted object, the folder of a saved one, or the name of a method.

        Args:
            aligner: object, folder or name; a method by name is fitted on ``source`` and ``target``.
            source, target: unpaired embeddings, anything that ``fit`` takes.
            noise_std, noise_factor, trainable: as for the class.
            noise_shape: ``residual`` makes the factor from what the aligner's stand-ins of ``source`` miss of
                ``target``: :func:`aniso_ext.align.residual.residual_noise_factor`.
            neighbours: so many rows of ``target`` near each stand-in take its place, by their mean; 0 for none.

        Raises:
            InputError: a name, a residual or neighbours without embeddings, an unknown shape, a shape beside a factor,
                or a residual beside neighbours.
            ArtefactError: the folder holds no aligner.
        """
        if noise_shape not in NOISE_SHAPES:
            raise InputError(f"noise_shape must be one of {', '.join(NOISE_SHAPES)}, got {noise_shape!r}")
        resolved = _resolve(aligner, source, target)
        if noise_shape == "residual" and neighbours:
            raise InputError(
                "the residual is that of the aligner, which neighbours replace: take noise_shape='isotropic'"
            )
        if noise_shape == "residual" and noise_std:
            noise_factor = _residual_factor(resolved, source, target, noise_factor)
        return cls(
            resolved,
            noise_std=noise_std,
            noise_factor=noise_factor,
            neighbours=_neighbour_mean(resolved, source, target, neighbours) if neighbours else None,
            trainable=trainable,
        )

    @classmethod
    def nearest(cls, source: Any, target: Any, *, neighbours: int = 5, noise_std: float = 0.0) -> Correction:
        """The mean of the rows of ``target`` near each source embedding as it is; no aligner."""
        return cls(noise_std=noise_std, neighbours=_neighbour_mean(None, source, target, neighbours))

    @classmethod
    def noise(cls, sigma: float) -> Correction:
        """Gaussian noise of standard deviation ``sigma`` in each coordinate, renormalised; no aligner."""
        return cls(noise_std=sigma)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Stand-ins [n, D] of source embeddings [n, D], float32 or float64, whatever autocast is on."""
        rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        with torch.autocast(rows.device.type, enabled=False):
            if self.refined is not None:
                rows = self.refined(rows)
            elif self.aligner is not None:
                with torch.no_grad():
                    rows = self.aligner.transform_batch(rows)
            if self.neighbours is not None:
                rows = self.neighbours(rows)
        if self.noise_std:
            noise = torch.randn_like(rows)
            if self.noise_factor is not None:
                self.noise_factor = self.noise_factor.to(rows)
                noise = noise @ self.noise_factor.T
            noisy = rows + self.noise_std * noise
            rows = noisy / noisy.norm(dim=-1, keepdim=True)
        return rows

    def fresh(self) -> Correction:
        """The same correction with the parameters of the fit, apart from this one."""
        return Correction(
            self.aligner,
            noise_std=self.noise_std,
            noise_factor=self.noise_factor,
            neighbours=self.neighbours,
            trainable=self.refined is not None,
        )

    def tuned_aligner(self) -> Aligner | None:
        """The aligner with the refiner as it is now; the aligner itself where nothing is trained."""
        return self.aligner if self.refined is None else self.refined.aligner()


class RefinedCorrection(nn.Module):
    """AnisoAlign with a refiner that takes gradients: encode, refiner, decode (METHOD section 4).

    The bounds hold whatever the parameters become, since :func:`aniso_ext.ops.decode` applies them.

    Args:
        aligner: fitted with refinement; its own refiner stays as it is.
    """

    def __init__(self, aligner: AnisoAlign) -> None:
        super().__init__()
        self.frame: Frame = aligner.frame_
        self.backend = aligner.backend
        self._fitted = aligner
        refiner = aligner.refiner_
        assert refiner is not None
        self.refiner = copy.deepcopy(refiner).requires_grad_(True).train()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Unit rows [n, D] of rows [n, D]; differentiable in the rows and in the refiner's parameters."""
        state = encode(rows, self.frame, backend=self.backend)
        deltas = self.refiner(state.to(self.refiner.first.weight.dtype)).to(state.dtype)
        bounds = self.refiner.bounds
        return decode(
            state,
            deltas,
            self.frame,
            a_theta=bounds.a_theta,
            a_rho=bounds.a_rho,
            a_v=bounds.a_v,
            literal=self.refiner.literal,
            backend=self.backend,
        )

    def aligner(self) -> AnisoAlign:
        """The aligner with these parameters. Its calibration is that of the fit."""
        twin = copy.copy(self._fitted)
        twin._install({**self._fitted._arrays(), **copy.deepcopy(self.refiner).float().tensors()}, self._fitted.width)
        return twin


def _with_refiner(aligner: Aligner | None) -> AnisoAlign:
    from aniso_ext.align import AnisoAlign

    if not isinstance(aligner, AnisoAlign) or aligner.refiner_ is None:
        method = "no aligner" if aligner is None else aligner.method
        raise InputError(
            f"{method} has no refiner to train: pass an anisoalign that was fitted with refinement, or leave the "
            "refiner as it is"
        )
    return aligner


def _resolve(aligner: Aligner | str | PathLike[str], source: Any, target: Any) -> Aligner:
    from aniso_ext.align import Aligner, list_aligners, load_aligner, make_aligner

    if isinstance(aligner, Aligner):
        return aligner
    if str(aligner) not in list_aligners():
        return load_aligner(str(aligner))
    if source is None or target is None:
        raise InputError(
            f"{aligner} is the name of a method: it is fitted on source and target embeddings, so pass both, or the "
            "folder of a fitted aligner"
        )
    return make_aligner(str(aligner)).fit(source, target)


def _residual_factor(aligner: Aligner, source: Any, target: Any, given: torch.Tensor | None) -> torch.Tensor:
    from aniso_ext.align.residual import residual_noise_factor

    if given is not None:
        raise InputError("noise_shape='residual' makes the factor: leave noise_factor out")
    if source is None or target is None:
        raise InputError("noise_shape='residual' is estimated from source and target embeddings: pass both")
    return residual_noise_factor(aligner, source, target)


def _neighbour_mean(aligner: Aligner | None, source: Any, target: Any, count: int) -> NeighbourMean:
    from aniso_ext.align.neighbours import NeighbourMean

    if source is None or target is None:
        raise InputError("neighbours are rows of the target, found from the mean of the source: pass both")
    return NeighbourMean.of(aligner, source, target, count=count)


def _checked_neighbours(found: NeighbourMean | None, width: int | None, trainable: bool) -> NeighbourMean | None:
    if found is not None and trainable:
        raise InputError("no gradient passes neighbours to a refiner: leave neighbours or trainable out")
    if found is not None and width not in (None, found.width):
        raise InputError(f"neighbours must have the width of the aligner, {width}, got {found.width}")
    return found


def _fingerprint(
    aligner: Aligner | None, neighbours: NeighbourMean | None, noise_std: float, factor: torch.Tensor | None
) -> str | None:
    parts = [] if aligner is None else [aligner.fingerprint()]
    if neighbours is not None:
        parts.append(neighbours.fingerprint)
    if noise_std:
        parts.append(f"noise:{noise_std:g}")
    if factor is not None:
        values = factor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
        parts.append(f"shape:{hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()}")
    return "+".join(parts) or None


def _checked_factor(factor: torch.Tensor | None, width: int | None) -> torch.Tensor | None:
    if factor is None:
        return None
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or width not in (None, len(factor)):
        wanted = "[D, D]" if width is None else f"[{width}, {width}], the width of the aligner"
        raise InputError(f"noise_factor must be {wanted}, got {list(factor.shape)}")
    if not bool(torch.isfinite(factor).all()):
        raise InputError("noise_factor has values that are not finite")
    return factor
