"""Which directions of the residual error cost a text-only trained reader of image embeddings its score.

    python benchmarks/ladder_directions.py                         # both data sets: the CSV and the figure
    python benchmarks/ladder_directions.py --reader linear --only fashion44k      # a piece; the rest of the CSV stays

The ladder of text_only_fashion.py trains a language model on stand-ins of texts and judges it on images. Here a linear
reader takes its place, which has a closed form: the best linear map, in the mean square, from stand-ins with noise of a
covariance C to the attributes and to the words of the titles. Noise enters as C alone, so that a variant takes seconds.
Networks of two hidden layers check what holds for a reader that is not linear. Parts:

- ``ladder``: arms with isotropic noise, and their rank correlation with the CSV of the ladder.
- ``replaced``, ``spoiled``: parts of AnisoAlign's stand-ins taken from the paired image, and parts of the image taken
  from the stand-in. Pairs serve this analysis only.
- ``spectrum``: energy of the error along eigenvectors of the target's covariance, and its share between classes.
- ``noise``: covariances of the noise, among them the residual as estimated without pairs.
- ``defaults``: rank, mixing and complement of the closed form under both kinds of noise.
- ``neighbours``: the mean of target rows near a stand-in in its place, its own target and copies of it left out; and
  stand-ins drawn towards their mean by what the unpaired residual says of them (Wiener).

A level of noise is chosen by the attributes of 2 000 kept training rows, as in the ladder. Nothing of the test rows
chooses anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ladder_neighbours import COUNTS, NETWORK_COUNTS, mean_of_strangers, shrunken
from ladder_readers import LinearReader, Moments, Problem, accuracy_of_network, load_problem, unit
from rich.console import Console

import aniso_ext as aniso
from aniso_ext.align.residual import noise_factor, unpaired_residual
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import read_table, write_table

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
LADDER = RESULTS / "h100_fashion44k_ladder.csv"
DATA = Path(os.environ.get("ANISO_DATA", REPOSITORY.parent / "shared" / "data"))
PICTURE = REPOSITORY / "docs" / "figures" / "ladder_directions.png"
SETS = ("fashion44k", "clip_vitb32_classpairs")
LEVELS = (0.0, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.06)
NETWORK_LEVELS = (0.0, 0.01, 0.02, 0.04)
NETWORK_ARMS = ("identity", "realign", "anisoalign", "images")
BANDS = ((0, 8), (8, 32), (32, 128), (128, 256), (256, 512))
Rows = list[dict[str, Any]]
console = Console(stderr=True)


@dataclass(frozen=True)
class Pair:
    """Stand-ins and the paired images of the same rows, both [N, D], in the frame ``basis`` [D, R] of the method."""

    standin: torch.Tensor
    image: torch.Tensor
    basis: torch.Tensor


def polar(rows: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Radii and unit phases (complex) of the blocks, complement direction and its norm."""
    coordinates = rows @ basis
    blocks = torch.complex(coordinates[:, 0::2].contiguous(), coordinates[:, 1::2].contiguous())
    radii = blocks.abs()
    complement = rows - coordinates @ basis.T
    length = complement.norm(dim=1, keepdim=True)
    return radii, blocks / radii.clamp_min(1e-20), complement / length.clamp_min(1e-20), length


def assemble(parts: tuple[torch.Tensor, ...], basis: torch.Tensor) -> torch.Tensor:
    """Unit rows with these radii, phases and complement: what :func:`polar` took apart."""
    radii, phases, direction, length = parts
    coordinates = torch.view_as_real(radii * phases).flatten(1)
    return unit(coordinates @ basis.T + direction * length)


PARTS = {
    "phases": (1,),
    "radii": (0,),
    "complement direction": (2,),
    "complement norm": (3,),
    "frame (phases, radii)": (0, 1),
    "complement": (2, 3),
}


def swap_parts(base: torch.Tensor, other: torch.Tensor, basis: torch.Tensor, taken: tuple[int, ...]) -> torch.Tensor:
    """``base`` with the polar parts numbered in ``taken`` from ``other``, rows made unit."""
    own, foreign = polar(base, basis), polar(other, basis)
    return assemble(tuple(foreign[i] if i in taken else own[i] for i in range(4)), basis)


def class_means(rows: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The mean of the class of each row, [N, D]."""
    count = int(classes.max()) + 1
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, classes, rows)
    sizes = torch.bincount(classes, minlength=count).clamp_min(1).to(rows.dtype)
    return (sums / sizes[:, None])[classes]


def variants(base: torch.Tensor, other: torch.Tensor, problem: Problem, basis: torch.Tensor) -> Iterator[Any]:
    """Name and rows of ``base`` with one part after the other taken from ``other``."""
    for name, taken in PARTS.items():
        yield name, swap_parts(base, other, basis, taken)
    yield "mean", unit(base - base.mean(dim=0) + other.mean(dim=0))
    own, foreign = class_means(base, problem.classes), class_means(other, problem.classes)
    yield "class means (bias)", unit(base - own + foreign)
    yield "within classes", unit(own + other - foreign)
    directions = eigenvectors(problem.target)
    for first, last in BANDS:
        band = directions[:, first:last]
        yield f"eigendirections {first + 1}-{last}", unit(base + (other - base) @ band @ band.T)


def eigenvectors(rows: torch.Tensor) -> torch.Tensor:
    """Of the covariance, strongest first, [D, D]."""
    return torch.linalg.eigh(covariance(rows))[1].flip(1)


def covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / len(rows)


def to_shape(matrix: torch.Tensor) -> torch.Tensor:
    """The same covariance with the trace of the identity."""
    return matrix * (len(matrix) / matrix.diagonal().sum())


def spectrum(pair: Pair, classes: torch.Tensor, bands: tuple[tuple[int, int], ...] = BANDS) -> Rows:
    """For bands of eigendirections of the target: energy of target and error, shares between classes, and the fit.

    ``slope`` and ``correlation`` are those of the image's coordinate on the stand-in's, averaged with the weight of the
    target's energy: a slope of 1 would mean that what is missing is noise that does not depend on the stand-in.
    """
    directions = eigenvectors(pair.image)
    image, standin = pair.image @ directions, pair.standin @ directions
    error = image - standin
    bias = class_means(error, classes).square().mean(dim=0)
    whole, energy = error.square().mean(dim=0), image.var(dim=0, correction=0)
    joint = ((image - image.mean(dim=0)) * (standin - standin.mean(dim=0))).mean(dim=0)
    spread = standin.var(dim=0, correction=0).clamp_min(1e-20)
    found = []
    for first, last in bands:
        part = slice(first, last)
        weight = energy[part] / energy[part].sum()
        correlation = joint[part] / (spread[part] * energy[part]).sqrt().clamp_min(1e-20)
        found.append(
            {
                "variant": f"{first + 1}-{last}",
                "target_energy": float(energy[part].sum()),
                "error_energy": float(whole[part].sum()),
                "between_share": float(bias[part].sum() / whole[part].sum()),
                "slope": float((weight * joint[part] / spread[part]).sum()),
                "correlation": float((weight * correlation).sum()),
            }
        )
    return found


def noise_shapes(standin: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Covariances of noise by name, each with the trace of the identity."""
    width = standin.shape[1]
    random = torch.Generator().manual_seed(0)
    unpaired = problem.target[torch.randperm(len(problem.target), generator=random)]
    found = {
        "isotropic": torch.eye(width),
        "target covariance": to_shape(covariance(problem.target)),
        "unpaired residual": to_shape(unpaired_residual(standin, unpaired).float()),
        "paired residual (oracle)": to_shape(covariance(problem.target - standin)),
    }
    found["half isotropic, half unpaired"] = (found["isotropic"] + found["unpaired residual"]) / 2
    return found


def closeness(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of two covariances as vectors."""
    return float((first * second).sum() / (first.norm() * second.norm()))


def standins(problem: Problem, keep: Path | None) -> dict[str, torch.Tensor]:
    """Of the training rows, by arm; AnisoAlign's from the folder ``keep`` if they are there."""
    closed = fitted(problem, refine=False)
    problem.basis = closed.frame_.basis.float()
    found = {"identity": problem.source}
    for method in ("mean_shift", "realign", "gaussian_monge"):
        found[method] = fitted(problem, method).transform(problem.source)
    found["initialisation"] = closed.transform(problem.source)
    place = None if keep is None else keep / f"{problem.name}.npy"
    if place is not None and place.is_file():
        found["anisoalign"] = torch.from_numpy(np.load(place, allow_pickle=False))
    else:
        found["anisoalign"] = fitted(problem).transform(problem.source)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            np.save(place, found["anisoalign"].numpy())
    return {**found, "images": problem.target}


def fitted(problem: Problem, method: str = "anisoalign", **options: Any) -> Any:
    """An aligner of the training rows, the two sides shuffled apart as in the ladder."""
    random = np.random.default_rng(0)
    sides = (rows.numpy()[random.permutation(len(rows))] for rows in (problem.source, problem.target))
    return aniso.make_aligner(method, **options).fit(*sides)


def measured(problem: Problem, rows: torch.Tensor, shape: torch.Tensor, levels: tuple[float, ...] = LEVELS) -> Rows:
    """Scores of the linear reader for every level; ``chosen`` is the one with the best kept attributes."""
    reader = LinearReader(problem, Moments.of(problem, rows))
    found = [{"level": level, **reader.scores(shape * level**2)} for level in levels]
    best = max(range(len(found)), key=lambda index: found[index]["kept_attributes"])
    return [{**row, "chosen": index == best} for index, row in enumerate(found)]


def linear_lines(problem: Problem, arms: dict[str, torch.Tensor], seeds: int) -> Iterator[dict[str, Any]]:
    """All lines of the linear reader, which has no seeds."""
    isotropic = torch.eye(problem.source.shape[1])
    rows, image = arms["anisoalign"], problem.target

    def lines(part: str, arm: str, variant: str, values: Rows) -> Iterator[dict[str, Any]]:
        chosen = next((row for row in values if row.get("chosen")), values[0])
        score = f": {chosen['test_attributes']:.4f}" if "test_attributes" in chosen else ""
        console.print(f"{problem.name}: {part}, {arm}, {variant}{score}", soft_wrap=True)
        for row in values:
            yield {"data": problem.name, "part": part, "arm": arm, "reader": "linear", "variant": variant, **row}

    for arm, own in arms.items():
        yield from lines("ladder", arm, "as it is", measured(problem, own, isotropic))
    for name, changed in variants(rows, image, problem, problem.basis):
        yield from lines("replaced", "anisoalign", name, measured(problem, changed, isotropic))
    for name, changed in variants(image, rows, problem, problem.basis):
        yield from lines("spoiled", "images", name, measured(problem, changed, isotropic))
    for arm in ("identity", "realign", "gaussian_monge", "anisoalign"):
        for row in spectrum(Pair(arms[arm], image, problem.basis), problem.classes):
            yield from lines("spectrum", arm, row.pop("variant"), [row])
        shapes = noise_shapes(arms[arm], problem)
        for name, shape in shapes.items():
            near = closeness(shape, shapes["paired residual (oracle)"])
            values = [{**row, "closeness": near} for row in measured(problem, arms[arm], shape)]
            yield from lines("noise", arm, name, values)
    for name, options in candidates().items():
        own = fitted(problem, refine=False, **options).transform(problem.source)
        shapes = noise_shapes(own, problem)
        for kind in ("isotropic", "unpaired residual"):
            yield from lines("defaults", "initialisation", f"{name}, {kind}", measured(problem, own, shapes[kind]))
    for arm in ("identity", "realign", "anisoalign"):
        for count in COUNTS:
            own = mean_of_strangers(arms[arm], problem, count)
            yield from lines("neighbours", arm, f"mean of {count}", measured(problem, own, isotropic))
        residual = noise_shapes(arms[arm], problem)
        for kind in ("unpaired residual", "paired residual (oracle)"):
            own, rest = shrunken(arms[arm], problem, paired=kind.endswith("(oracle)"))
            values = measured(problem, own, to_shape(rest))
            yield from lines("neighbours", arm, f"Wiener by {kind}, noise of what is left", values)
            yield from lines("neighbours", arm, f"Wiener by {kind}, its noise", measured(problem, own, residual[kind]))


def candidates() -> dict[str, dict[str, Any]]:
    """Options of the closed form, one changed at a time."""
    return {
        "default": {},
        "rank 64": {"rank": 64},
        "rank 256": {"rank": 256},
        "balanced": {"mixing": "balanced"},
        "pca_adjacent": {"mixing": "pca_adjacent"},
        "diagonal": {"complement": "diagonal"},
    }


def network_lines(problem: Problem, arms: dict[str, torch.Tensor], seeds: int) -> Iterator[dict[str, Any]]:
    """Networks of several seeds on arms with isotropic noise, and with the unpaired residual."""
    for arm in NETWORK_ARMS:
        rows = arms[arm]
        round_shape = torch.eye(rows.shape[1])
        given = {"isotropic": (rows, round_shape)}
        if arm not in ("identity", "images"):
            given["unpaired residual"] = (rows, noise_shapes(rows, problem)["unpaired residual"])
        if arm != "images":
            given |= {
                f"mean of {count}": (mean_of_strangers(rows, problem, count), round_shape) for count in NETWORK_COUNTS
            }
        for name, (own, shape) in given.items():
            factor = noise_factor(shape).float()
            levels = [level for level in NETWORK_LEVELS if arm != "images" or not level]
            values = []
            for level in levels[1:] if name == "unpaired residual" else levels:
                scores = [accuracy_of_network(problem, own, factor * level, seed) for seed in range(seeds)]
                mean = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
                spread = {"deviation": float(np.std([score["test_attributes"] for score in scores], ddof=1))}
                values.append({"level": level, **mean, **(spread if seeds > 1 else {})})
            best = max(values, key=lambda row: row["kept_attributes"])
            for row in values:
                part = "neighbours" if name.startswith("mean") else "noise"
                line = {"data": problem.name, "part": part, "arm": arm, "reader": "network", "variant": name}
                text = f"{problem.name}: network, {arm}, {name} {row['level']}: {row['test_attributes']:.4f}"
                console.print(text, soft_wrap=True)
                yield {**line, **row, "chosen": row is best}


READERS = {"linear": linear_lines, "network": network_lines}


def agreement(found: Rows) -> Rows:
    """Spearman's correlation of the readers with the ladder of language models, over arms and levels of noise."""
    if not LADDER.is_file():
        return []
    table: dict[tuple[str, float, str], list[float]] = {}
    for row in read_table(LADDER)[1]:
        if row["split"] == "test" and row["score"] in ("attribute", "cider_d"):
            arm, _, level = row["arm"].rpartition("-") if row["arm"][-1].isdigit() else (row["arm"], "", "0")
            arm = "identity" if arm == "noise" else arm
            table.setdefault((arm, float(level), row["score"]), []).append(float(row["value"]))
    lines = []
    for reader in ("linear", "network"):
        own = [
            row
            for row in found
            if row["data"] == "fashion44k"
            and row["reader"] == reader
            and row["variant"] in ("as it is", "isotropic")
            and row["part"] == ("ladder" if reader == "linear" else "noise")
        ]
        for score, column in (("attribute", "test_attributes"), ("cider_d", "test_words")):
            shared = [row for row in own if (row["arm"], row["level"], score) in table]
            if len(shared) > 2:
                theirs = [float(np.mean(table[row["arm"], row["level"], score])) for row in shared]
                value = float(np.corrcoef(ranks(theirs), ranks([row[column] for row in shared]))[0, 1])
                line = {"data": "fashion44k", "part": "agreement", "arm": "all", "reader": reader, "variant": score}
                lines.append({**line, "correlation": value, "points": len(shared)})
    return lines


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = DATA,
    only: Annotated[list[str] | None, typer.Option(help="Data set; may be given several times.")] = None,
    reader: Annotated[list[str] | None, typer.Option(help="linear or network; default: both.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the networks.")] = 2,
    keep: Annotated[
        Path | None, typer.Option(help="Folder that keeps AnisoAlign's stand-ins, whose fit takes minutes on a CPU.")
    ] = None,
    render: Annotated[bool, typer.Option("--render", help="Only the agreement and the figure, from the CSV.")] = False,
    csv: Annotated[Path, typer.Option(help="Where the lines go.")] = RESULTS / "ladder_directions.csv",
    picture: Annotated[Path, typer.Option(help="Where the figure goes.")] = PICTURE,
) -> None:
    """Write the CSV and the figure. Lines of other data sets and readers that the CSV has stay in it."""
    names, readers = ([], []) if render else (only or list(SETS), reader or list(READERS))
    if unknown := sorted({*names} - {*SETS} | {*readers} - {*READERS}):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join((*SETS, *READERS))}")
    if missing := [name for name in names if not (data / name / "captions.jsonl").is_file()]:
        text = f"{data} holds no {missing[0]}/captions.jsonl: name the data folder"
        raise typer.BadParameter(text, param_hint="--data")
    found: Rows = []
    for name in names:
        problem = load_problem(data / name)
        arms = standins(problem, keep)
        for each in readers:
            found.extend(READERS[each](problem, arms, seeds))
    new = {(row["data"], row["reader"]) for row in found}
    old = [row for row in recorded(csv) if (row["data"], row["reader"]) not in new and row["part"] != "agreement"]
    found = sorted(old + found, key=lambda row: (SETS.index(row["data"]), list(READERS).index(row["reader"])))
    found += agreement(found)
    save(found, csv)
    from ladder_directions_figure import draw

    draw(found).savefig(picture, dpi=160)
    console.print(f"written: {csv}\nwritten: {picture}")


def recorded(place: Path) -> Rows:
    """Lines of the CSV, numbers as numbers; none if it is not there."""
    if not place.is_file():
        return []
    names = {"data", "part", "arm", "reader", "variant"}
    lines = []
    for row in read_table(place)[1]:
        values = {key: float(value) for key, value in row.items() if value and key not in {*names, "chosen"}}
        marked = {"chosen": row["chosen"] == "yes"} if row["chosen"] else {}
        lines.append({**{name: row[name] for name in names}, **values, **marked})
    return lines


def save(found: Rows, place: Path) -> None:
    """Write the CSV; its columns are those of all lines."""
    columns = dict.fromkeys(("data", "part", "arm", "reader", "variant", *(name for row in found for name in row)))
    command = "python benchmarks/ladder_directions.py " + " ".join(sys.argv[1:])
    header = {**facts(torch.device("cpu")), "command": command.strip()}
    write_table(place, header, [{name: row.get(name) for name in columns} for row in found])


if __name__ == "__main__":
    typer.run(main)
