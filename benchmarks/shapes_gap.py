"""The modality gap of the shapes world's dual encoder, before and after its training.

    python benchmarks/shapes_gap.py            # seven minutes on one core; writes results/shapes_gap.csv

Held-out pairs of captions and pictures, embedded by the encoder that training starts from and by the trained one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from aniso_ext import diagnostics
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import write_table
from aniso_ext.worlds.shapes import DualEncoder, DualEncoderOptions, Scene, ShapesWorld
from aniso_ext.worlds.shapes.dual_encoder import untrained_dual_encoder
from aniso_ext.worlds.shapes.files import retrieval

RESULTS = Path(__file__).resolve().parent / "results" / "shapes_gap.csv"
CONSTANTS = ("c_lambda", "o_q", "g_mu", "g_sigma", "d_center", "r_res", "a_r", "d_eff_ratio")


def measure(name: str, world: ShapesWorld, encoder: DualEncoder, scenes: list[Scene]) -> dict[str, Any]:
    texts, images = world.embed(encoder, scenes)
    report = diagnostics.gap(texts, images)
    found = retrieval(texts, images)
    return {
        "encoder": name,
        "pairs": len(scenes),
        "recall_at_1": found["recall_at_1"],
        "recall_at_10": found["recall_at_10"],
        "cosine": float((texts * images).sum(axis=1).mean()),
        **{constant: getattr(report, constant) for constant in CONSTANTS},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--logit-scale", type=float, nargs="*", default=[1 / 0.07, DualEncoderOptions.logit_scale, 100.0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    world = ShapesWorld(seed=arguments.seed)
    scenes = world.scenes(arguments.pairs, split="test")
    options = DualEncoderOptions(seed=arguments.seed)
    rows = [measure("untrained", world, untrained_dual_encoder(world, options=options), scenes)]
    for scale in arguments.logit_scale:
        started = time.perf_counter()
        encoder = world.train_dual_encoder(options=replace(options, logit_scale=scale))
        seconds = time.perf_counter() - started
        rows.append({**measure(f"logit scale {scale:.0f}", world, encoder, scenes), "training_seconds": round(seconds)})
    rows[0]["training_seconds"] = 0
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    settings = " ".join(f"{field.name}={getattr(options, field.name)}" for field in fields(options))
    write_table(arguments.out, {**facts(torch.device("cpu")), "options": settings}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
