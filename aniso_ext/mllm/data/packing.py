"""Several samples in one row of tokens."""

from __future__ import annotations

import numpy as np

OPEN_PACKS = 64


def plan_packs(lengths: np.ndarray, room: int, *, seed: int) -> list[np.ndarray]:
    """Indices of the samples of each pack: shuffled, then each into the first open pack that has room for it.

    At most ``OPEN_PACKS`` packs are open; the fullest is closed for a new one.

    Args:
        lengths: [N] tokens of each sample, none above ``room``.
        room: tokens of a pack.
        seed: of the shuffle; the plan is a function of it and of the lengths.

    Example:
        >>> [pack.tolist() for pack in plan_packs(np.array([3, 3, 2, 4]), 6, seed=0)]
        [[2, 0], [1], [3]]
    """
    space = np.empty(0, np.int64)
    packs: list[list[int]] = []
    closed: list[list[int]] = []
    for sample in np.random.default_rng(seed).permutation(len(lengths)):
        length = lengths[sample]
        fitting = np.flatnonzero(space >= length)
        if len(fitting):
            place = int(fitting[0])
        elif len(packs) < OPEN_PACKS:
            place = len(packs)
            packs.append([])
            space = np.append(space, room)
        else:
            place = int(space.argmin())
            closed.append(packs[place])
            packs[place] = []
            space[place] = room
        packs[place].append(int(sample))
        space[place] -= length
    return [np.asarray(pack, np.int64) for pack in closed + packs]
