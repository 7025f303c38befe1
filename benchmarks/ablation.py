"""What each part of the method does to held-out pairs: objectives, mixings, couplings, against all baselines.

    python benchmarks/ablation.py                          # everything; hours on two CPU cores
    python benchmarks/ablation.py --device cuda
    python benchmarks/ablation.py --sets fashion44k --seeds 1 --arms "full" realign      # a piece
    python benchmarks/ablation.py --render                 # the page again, from the CSV

Rows go to results/ablation.csv, one arm of one data set and seed each, saved when it is done. What is there under the
same options is not done again, so a run may be broken off anywhere and done in pieces. The page docs/ablation.md is
written from the CSV at the end of every run. Arms that differ in Stage II alone share Stage I through its checkpoint,
kept below ``--work``. ``--data`` names the folder that holds fashion44k/ and clip_vitb32_classpairs/.

Every method is fitted on unpaired training rows, the two sides shuffled apart, and judged on held-out pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_data import COLUMNS, REPOSITORY, RESULTS, TITLES, Split, judge, load_split

import aniso_ext as aniso
from aniso_ext.align import Aligner, PriorOptions, RefinementOptions
from aniso_ext.align.stages import PRIOR_TRAINING, REFINEMENT_TRAINING
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import read_table, write_table

SETS = ("fashion44k", "clip_vitb32_classpairs")
BASELINES = ("identity", "mean_shift", "c3_paper", "c3_code", "realign", "gaussian_monge", "per_dim_std")
SEEDED = ("c3_paper", "c3_code")
RIVALS = ("realign", "c3_paper", "c3_code")
MIXINGS = ("haar", "phase_stable", "balanced")
RANKS = (64, 128, 256, 512)
BOUNDS = (("a_theta", 0.05), ("a_theta", 0.2), ("a_rho", 0.0), ("a_v", 0.02))
OFF = {"score_weight": 0.0, "consistency_weight": 0.0, "complement_weight": 0.0}
FULL = "full"
MEASURED = ("balance", *COLUMNS)
HEADS = ("b", *TITLES)
RECORDED = ("eps_eff_median", "collapsed_blocks", "phase_concentration_initial", "phase_concentration_refined")


@dataclass(frozen=True)
class Arm:
    """One row of the tables: a method and its options beside the defaults of the package."""

    label: str
    group: str
    method: str = "anisoalign"
    options: dict[str, Any] = field(default_factory=dict)
    calibration: str = "auto"


@dataclass(frozen=True)
class Schedule:
    """Where and for how long the two stages train."""

    device: str | None
    prior_steps: int
    refiner_steps: int

    def aligner(self, arm: Arm, seed: int) -> Aligner:
        """The unfitted aligner of an arm."""
        if arm.method != "anisoalign":
            return aniso.make_aligner(arm.method, **({"seed": seed} if arm.method in SEEDED else {}), **arm.options)
        training = {
            "prior_training": replace(PRIOR_TRAINING, steps=self.prior_steps),
            "refinement_training": replace(REFINEMENT_TRAINING, steps=self.refiner_steps),
        }
        return aniso.AnisoAlign(**arm.options, **training, seed=seed, device=self.device)


def objectives(*kept: str) -> RefinementOptions:
    """The defaults with only the named weights left on."""
    weights = {f"{name}_weight": getattr(RefinementOptions(), f"{name}_weight") for name in kept}
    return RefinementOptions(**(OFF | weights))


def arms() -> list[Arm]:
    """All rows: baselines, stages of the default, mixings and couplings."""
    stages: dict[str, dict[str, Any]] = {
        "initialisation": {"refine": False},
        "+ refiner": {"refinement": objectives()},
        "+ L_II": {"refinement": objectives("score")},
        "+ L_Phi": {"refinement": objectives("consistency")},
        "+ V-side": {"refinement": objectives("complement")},
        "+ L_II + L_Phi": {"refinement": objectives("score", "consistency")},
        "+ L_II + V-side": {"refinement": objectives("score", "complement")},
        FULL: {},
        "literal": {"literal": True},
    }
    default, connected = aniso.AnisoAlign().mixing, PriorOptions().connected
    found = [Arm(method, "baselines", method) for method in BASELINES]
    found += [Arm(label, "stages", options=options) for label, options in stages.items()]
    for mixing in MIXINGS:
        if mixing != default:
            found.append(Arm(f"initialisation, {mixing}", "mixings", options={"mixing": mixing, "refine": False}))
            found.append(Arm(f"{FULL}, {mixing}", "mixings", options={"mixing": mixing}))
        other = "not connected" if connected else "connected"
        options: dict[str, Any] = {"mixing": mixing, "prior": PriorOptions(connected=not connected)}
        found.append(Arm(f"{FULL}, {mixing}, {other}", "mixings", options=options))
    for rank in RANKS:
        if rank != aniso.AnisoAlign().rank:
            found.append(Arm(f"initialisation, rank {rank}", "ranks", options={"rank": rank, "refine": False}))
            found.append(Arm(f"{FULL}, rank {rank}", "ranks", options={"rank": rank}))
    for name, value in BOUNDS:
        changed = replace(RefinementOptions(), **{name: value})
        found.append(Arm(f"{FULL}, {name} {value:g}", "bounds", options={"refinement": changed}))
    for label, method, options in (
        ("realign", "realign", {}),
        ("initialisation", "anisoalign", {"refine": False}),
        (FULL, "anisoalign", {}),
    ):
        found.append(Arm(f"{label}, corpus", "calibrations", method, options, calibration="corpus"))
    return found


def described(aligner: Aligner) -> str:
    """Everything that decides what an aligner is, as JSON."""
    options = {name: value for name, value in aligner.get_params().items() if name not in ("device", "backend")}
    return json.dumps(options, sort_keys=True, default=asdict)


def fit(aligner: Aligner, split: Split, work: Path) -> None:
    """Fit; Stage I is taken from the checkpoint of another arm where that one trained the same."""
    if not isinstance(aligner, aniso.AnisoAlign) or not aligner.refine:
        aligner.fit(split.source_train, split.target_train)
        return
    options = {**json.loads(described(aligner)), "refinement": None, "refinement_training": None}
    rows = [split.name, len(split.source_train), str(aligner.device)]
    shared = work / f"prior_{digest([rows, options])}.pt"
    folder = work / digest([rows, described(aligner)])
    if shared.is_file() and not (folder / "prior.pt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared, folder / "prior.pt")
    aligner.fit(split.source_train, split.target_train, checkpoint_dir=folder)
    shutil.copyfile(folder / "prior.pt", shared)
    shutil.rmtree(folder)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def measure(arm: Arm, split: Split, seed: int, schedule: Schedule, work: Path) -> dict[str, Any]:
    """Fit and judge one arm: a row of the CSV."""
    aligner = schedule.aligner(arm, seed)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the refiner has concentrated the phases")  # it is in the table
        fit(aligner, split, work)
    seconds = time.perf_counter() - started
    values = judge(split, aligner.transform(split.source_test, calibration=arm.calibration))
    record = {name: aligner.summary_.get(name) for name in RECORDED}
    return {**values, "balance": min(values["m_z"], values["m_x"]), **record, "seconds": seconds}


class Table:
    """The rows of the CSV by data set, seed and arm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = read_table(path)[1] if path.is_file() else []
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {self._key(row): row for row in rows}

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this arm is there, measured with the same options on the same rows."""
        known = self.rows.get(self._key(row))
        return known is not None and all(str(known[name]) == str(value) for name, value in row.items())

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row and save the file."""
        self.rows[self._key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        write_table(temporary, {"command": "python benchmarks/ablation.py"}, list(self.rows.values()))
        os.replace(temporary, self.path)

    def of(self, data: str, arm: str) -> list[dict[str, Any]]:
        """All seeds of an arm, in the order of the seeds."""
        found = [row for row in self.rows.values() if (row["data"], row["arm"]) == (data, arm)]
        return sorted(found, key=lambda row: int(row["seed"]))

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return str(row["data"]), str(row["seed"]), str(row["arm"])


def subset(split: Split, train_rows: int | None, test_rows: int | None) -> Split:
    """The first rows of a split; the sides of its training rows are shuffled apart before."""
    order = np.random.default_rng(0).permutation(len(split.target_train))
    return Split(
        split.name,
        split.source_train[:train_rows],
        split.target_train[order][:train_rows],
        split.source_test[:test_rows],
        split.target_test[:test_rows],
    )


def run(arguments: argparse.Namespace, table: Table) -> None:
    """Measure what is not there yet."""
    chosen = [arm for arm in arms() if not arguments.arms or arm.label in arguments.arms]
    schedule = Schedule(arguments.device, arguments.prior_steps, arguments.refiner_steps)
    place = facts(torch.device(arguments.device or "cpu"))
    machine = {name: place[name] for name in ("device", "torch", "commit", "date")}
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            split = subset(load_split(arguments.data, name, seed), arguments.train_rows, arguments.test_rows)
            counts = {"train": len(split.source_train), "test": len(split.source_test)}
            for arm in chosen:
                identity = {"data": name, "seed": seed, "arm": arm.label, "group": arm.group, **counts}
                identity["calibration"] = arm.calibration
                identity["options"] = described(schedule.aligner(arm, seed))
                if table.has(identity):
                    continue
                print(f"{name}, seed {seed}: {arm.label} ...", file=sys.stderr, flush=True)
                table.add({**identity, **measure(arm, split, seed, schedule, arguments.work), **machine})


# The page


def cell(name: str, values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    digits = 1 if name == "a_r" else 3
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def numbers(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name] not in ("", None)]


def arm_lines(table: Table, data: str, group: str) -> Iterator[str]:
    yield f"| arm | {' | '.join(HEADS)} | eps_eff | collapsed | fit, s |"
    yield "|---" * (len(HEADS) + 4) + "|"
    for arm in arms():
        rows = table.of(data, arm.label) if arm.group == group else []
        if rows:
            cells = [cell(name, numbers(rows, name)) for name in MEASURED]
            for name, form in (("eps_eff_median", ".3f"), ("collapsed_blocks", ".0f"), ("seconds", ".0f")):
                found = numbers(rows, name)
                cells.append(f"{np.mean(found):{form}}" if found else "")
            yield f"| {arm.label} | {' | '.join(cells)} |"


def goal_lines(table: Table, data: str) -> Iterator[str]:
    """Differences of the default and of its closed form from the rivals, seed by seed."""
    goals = ("balance", "paired_cosine", "psi", "omega")
    yield "| compared | b | paired cosine | Psi | Omega | ahead on both, no lower on either |"
    yield "|---" * 6 + "|"
    for label in (FULL, "initialisation", *(f"{FULL}, rank {rank}" for rank in RANKS)):
        ours = {int(row["seed"]): row for row in table.of(data, label)}
        for rival in RIVALS:
            theirs = {int(row["seed"]): row for row in table.of(data, rival)}
            seeds = sorted(set(ours) & set(theirs))
            if not seeds:
                continue
            gaps = {name: [float(ours[s][name]) - float(theirs[s][name]) for s in seeds] for name in goals}
            mean = {name: float(np.mean(values)) for name, values in gaps.items()}
            reached = min(mean["balance"], mean["paired_cosine"]) > 0 and min(mean["psi"], mean["omega"]) >= 0
            spread = {n: f" ± {np.std(gaps[n]):.4f}" if len(seeds) > 1 else "" for n in goals}
            cells = [f"{mean[n]:+.4f}{spread[n]}" for n in goals]
            yield f"| {label} − {rival} | {' | '.join(cells)} | {'yes' if reached else 'no'} |"


TEXT = """
Fitted on unpaired training rows, judged on held-out pairs, k = 20; mean ± standard deviation over the seeds, of which
there are at most {seeds}. A seed draws the mixing, the networks, the batches, the noise of C3 and, for
clip_vitb32_classpairs, the split of the images. b = min(M_Z, M_X). Seconds are those of a fit in which Stage I may have
come from another arm.

- **initialisation** is the closed form.
- **+ refiner** adds the network with no objective. Its last layer starts at zero and nothing moves it: the row says
  that encode and decode give what the closed form gives, and no more. What a refiner does, its objectives make it do.
- **+ L_II**, **+ L_Phi** and **+ V-side** add one objective each. L_Phi alone is least where it starts: no move.
- **full** is the default of the package: all three objectives. **literal** is the printed form of every decision.
- The mixings also come with the other choice of couplings, with or without the share of the means (`connected`).
- **corpus** arms take the mean of the last calibration from the held-out rows, as the literal form does (METHOD D17);
  all other arms use that of the fit.
"""


def page(table: Table) -> str:
    """docs/ablation.md from the CSV."""
    rows = list(table.rows.values())
    seeds = len({int(row["seed"]) for row in rows})
    machines = sorted({f"{row['device']}, torch {row['torch']}, {row['commit']}, {row['date']}" for row in rows})
    lines = ["# Ablation", "", "`python benchmarks/ablation.py` writes this page from benchmarks/results/ablation.csv."]
    lines += ["Measured on:", ""]
    lines += [*(f"- {machine}" for machine in machines), TEXT.format(seeds=seeds).rstrip()]
    for data in SETS:
        inside = [row for row in rows if row["data"] == data]
        if not inside:
            continue
        lines += ["", f"## {data}: {inside[0]['train']} training rows, {inside[0]['test']} held-out pairs (first seed)"]
        for group in ("baselines", "stages", "mixings", "ranks", "bounds", "calibrations"):
            if any(row["group"] == group for row in inside):
                lines += ["", f"### {group.capitalize()}", "", *arm_lines(table, data, group)]
        lines += ["", "### The default against realign and C3, seed by seed", "", *goal_lines(table, data)]
    return "\n".join(lines) + "\n"


def main() -> int:
    default = Path(os.environ.get("ANISO_DATA", REPOSITORY.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default, help="default: ANISO_DATA, else ../shared/data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arms", nargs="+", metavar="LABEL", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", help="where both stages train and rows are transformed, e.g. cuda; default: CPU")
    parser.add_argument("--prior-steps", type=int, default=PRIOR_TRAINING.steps)
    parser.add_argument("--refiner-steps", type=int, default=REFINEMENT_TRAINING.steps)
    parser.add_argument("--train-rows", type=int, help="of each side; default: all")
    parser.add_argument("--test-rows", type=int, help="default: all of the split")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.csv")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "ablation.md")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "ablation", help="checkpoints of Stage I")
    parser.add_argument("--render", action="store_true", help="write the page from the CSV and measure nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.arms or ()) - {arm.label for arm in arms()})
    if unknown:
        parser.error(f"no arm is called {unknown[0]!r}: choose among {', '.join(repr(arm.label) for arm in arms())}")
    missing = [name for name in arguments.sets if not (arguments.data / name / "image.npy").is_file()]
    if missing and not arguments.render:
        parser.error(f"{arguments.data} holds no {missing[0]}/image.npy: name the data folder with --data")
    table = Table(arguments.out)
    try:
        if not arguments.render:
            run(arguments, table)
    finally:
        if table.rows:
            arguments.page.write_text(page(table), encoding="utf-8")
    print(f"{len(table.rows)} rows in {arguments.out}; {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
