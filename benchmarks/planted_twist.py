"""Which twists Stage II undoes in the planted world, by their kind and by the spread of the density.

    python benchmarks/planted_twist.py            # three minutes on one core; writes results/planted_twist.csv

Mean absolute phase error of held-out rows at the initialisation and after Stage II, whose bound a_theta is that of the
twist, .1; every other option of the refinement is the default. aniso_ext/worlds/planted.py says what to expect.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from aniso_ext.align.prior import PriorOptions, fit_prior
from aniso_ext.align.refiner import RefinedMap, RefinementOptions, fit_refiner
from aniso_ext.align.rows import open_rows
from aniso_ext.align.training import TrainingOptions
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import write_table
from aniso_ext.ops import correct
from aniso_ext.worlds import PlantedWorld

RESULTS = Path(__file__).resolve().parent / "results" / "planted_twist.csv"
SPREADS = (0.03, 0.1, 0.3, 1.0)
KINDS = ("offsets", "jitter", "common")
TRAIN, HELD_OUT = 6000, 2000


def phase_error(world: PlantedWorld, rows: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.abs(np.angle(np.exp(1j * (world.phases_of(rows) - truth)))).mean())


def measure(world: PlantedWorld, prior_steps: int, refiner_steps: int) -> dict[str, float | int | str]:
    given_source, given_target = world.draw(TRAIN).unpaired()
    source, target = open_rows(given_source, "source"), open_rows(given_target, "target")
    held_out = world.draw(HELD_OUT, seed=1)
    frame = world.frame(source, target)
    training = TrainingOptions(steps=prior_steps, batch_rows=512, learning_rate=5e-3, patience=0)
    options = PriorOptions(partners=world.size, connected=True, width=96, blocks=2)
    prior, found = fit_prior(target, frame, training, options)
    training = TrainingOptions(steps=refiner_steps, batch_rows=512, patience=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the refiner has concentrated the phases")
        refiner, record = fit_refiner(source, target, frame, prior, RefinementOptions(), training)
    given = torch.from_numpy(held_out.source)
    before = phase_error(world, correct(given, frame), held_out.phases)
    after = phase_error(world, RefinedMap(refiner)(given, frame), held_out.phases)
    return {
        "twist": world.twist,
        "spread": world.spread,
        "edges_found": found["prior_edges"],
        "edges_planted": len(world.edges),
        "error_initial": before,
        "error_refined": after,
        "ratio": after / before,
        "collapsed_blocks": record["collapsed_blocks"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior-steps", type=int, default=400)
    parser.add_argument("--refiner-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for twist in KINDS:
        for spread in SPREADS:
            world = PlantedWorld(twist=twist, spread=spread)
            rows.append(measure(world, arguments.prior_steps, arguments.refiner_steps))
            print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    steps = f"{arguments.prior_steps} of the prior, {arguments.refiner_steps} of the refiner"
    write_table(arguments.out, {**facts(torch.device("cpu")), "steps": steps}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
