"""The orthogonal mixing W of the basis, Q <- Q W, which decides what shares a block (METHOD D3)."""

from __future__ import annotations

import numpy as np
import torch

from aniso_ext.errors import InputError

MIXINGS = ("haar", "balanced", "pca_adjacent", "phase_stable")


def check_mixing(mixing: str) -> None:
    """Refuse a mixing that is unknown."""
    if mixing not in MIXINGS:
        raise InputError(f"mixing must be one of {', '.join(MIXINGS)}, got {mixing!r}")


def mixing_matrix(mixing: str, energies: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """W [R, R], float64 and orthogonal, for basis columns in order of falling energy (METHOD D3).

    - ``pca_adjacent``: W = I; blocks are the eigenvectors (1, 2), (3, 4), ...
    - ``balanced``: a permutation that pairs the strongest column with the weakest, the second with the last but one,
      ...: of all pairings the one with the smallest largest block energy and the largest smallest one.
    - ``haar``: uniform over the orthogonal group, drawn from ``seed`` (QR of a Gaussian matrix, signs fixed).
    - ``phase_stable``: the ``haar`` matrix, from which :func:`aniso_ext.align.phase_stable.learn_mixing` starts;
      learning takes target rows, so it is called by :func:`aniso_ext.align.fitting.fit_frame`.

    Args:
        mixing: one of the above.
        energies: [R] eigenvalues, falling.
        seed: of ``haar`` and ``phase_stable``.

    Raises:
        InputError: the mixing is unknown.

    Example:
        >>> import torch
        >>> mixing_matrix("balanced", torch.tensor([4.0, 3.0, 2.0, 1.0])).argmax(dim=0).tolist()
        [0, 3, 1, 2]
    """
    check_mixing(mixing)
    rank = len(energies)
    if mixing in ("haar", "phase_stable"):
        gaussian = np.random.default_rng(seed).standard_normal((rank, rank))
        orthogonal, triangular = np.linalg.qr(gaussian)
        return torch.from_numpy(orthogonal * np.sign(np.diag(triangular)))
    identity = torch.eye(rank, dtype=torch.float64)
    if mixing == "pca_adjacent":
        return identity
    strong = torch.arange(rank // 2)
    return identity[:, torch.stack((strong, rank - 1 - strong), dim=1).flatten()]
