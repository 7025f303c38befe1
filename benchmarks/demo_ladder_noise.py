"""The demo's ladder with noise on the stand-ins of every method: none, isotropic, and in the shape of the residual.

    python benchmarks/demo_ladder_noise.py --out FOLDER

For the worlds of the seeds 0 and 1: what `aniso demo` builds and fits, then its language models on stand-ins of each
method without noise, with isotropic noise, with noise in the shape of the unpaired residual, and with the mean of five
pictures of other scenes. Residual and neighbours are found among pictures of other scenes. As in the demo the first
seed chooses levels by validation scenes. Finished worlds and runs in FOLDER are taken over.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from aniso_ext.align import load_aligner
from aniso_ext.align.residual import residual_noise_factor
from aniso_ext.bench.environment import facts
from aniso_ext.cli.console import output
from aniso_ext.cli.demo_shapes import ARMS_SHOWN, ShapesDemo, build, fit, one_thread, train_arms
from aniso_ext.data import open_embeddings
from aniso_ext.mllm.arms import Arm, Ladder, choose_arms
from aniso_ext.mllm.library import say_errors_alone

RESULTS = Path(__file__).resolve().parent / "results" / "demo_ladder_noise.csv"
METHODS = ("mean_shift", "realign", "initialisation", "anisoalign")
ISOTROPIC = (0.02, 0.04, 0.06)
RESIDUAL = (0.01, 0.02, 0.03, 0.04, 0.06)
SCORES = ("cider_d", "attribute", "multiple_choice")


def arms() -> list[Arm]:
    """Those of the demo, and levels of both kinds of noise for each method."""
    found = choose_arms([*ARMS_SHOWN, *(f"{name}-neighbours" for name in METHODS)])
    for arm in choose_arms(METHODS):
        for std in ISOTROPIC:
            found.append(replace(arm, name=f"{arm.name}-{std}", tuned=f"{arm.name}-isotropic", noise_std=std))
        for std in RESIDUAL:
            name = f"{arm.name}-residual"
            shaped = replace(arm, name=f"{name}-{std}", tuned=name, noise_std=std, noise_shape="residual")
            found.append(shaped)
    return found


def run(demo: ShapesDemo) -> Ladder:
    """The ladder of one world."""
    console, world = output(), demo.folder / "world"
    aligners = demo.folder / "ladder" / "aligners"
    if not aligners.is_dir():
        demo.folder.mkdir(parents=True, exist_ok=True)
        build(demo, console)
        fit(demo, choose_arms(METHODS), console)
    source = open_embeddings(world / "train_text" / "text_emb").numpy()
    pictures = open_embeddings(world / "train_image" / "img_emb").numpy()
    for arm in choose_arms(METHODS):
        place = aligners / f"{arm.aligner}.noise.npy"
        if not place.is_file():
            np.save(place, residual_noise_factor(load_aligner(aligners / str(arm.aligner)), source, pictures).numpy())
    return train_arms(demo, arms(), console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the worlds")
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1], help="seeds")
    given = parser.parse_args()
    say_errors_alone()
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        header = {**facts(torch.device("cpu")), "command": "python benchmarks/demo_ladder_noise.py --out FOLDER"}
        file.writelines(f"# {name}: {value}\n" for name, value in header.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["world", "arm", "chosen", "score", "seed", "value"])
        for world in given.worlds:
            with one_thread():
                found = run(ShapesDemo(folder=given.out / f"demo{world}", seed=world))
            for arm, scores in found.scores.items():
                for name in SCORES:
                    for seed, value in enumerate(scores[name]):
                        writer.writerow([world, arm, found.chosen.get(arm, ""), name, seed, f"{value:.5g}"])


if __name__ == "__main__":
    main()
