"""Speed of both trained stages: a fit, one step of Stage II against eager and compiled PyTorch, and the refined map.

    python benchmarks/refiner_speed.py                  # CUDA where there is one, else a few small rows on the CPU
    python benchmarks/refiner_speed.py --parts step --batches 1024 16384
    python benchmarks/refiner_speed.py --parts step --batches 16384 --variants ours eager --profile

fit        AnisoAlign().fit on --rows x --width float16 rows of each side with default options: seconds in all, of each
           stage, and steps done (a stage may stop early).
step       one optimiser step of Stage II: loss, backward pass, clipping, fused AdamW, averaged weights. "ours" is the
           training loop's, "ours, kernel by kernel" the same without its CUDA graph. The rivals are the same objective
           on the reference backend, all rows together, under stock autograd: as it is ("eager"), under torch.compile
           ("compiled"), and that with mode="reduce-overhead", which records CUDA graphs of its own. Refiner, prior,
           batch and draws are the same for all. The first size is timed without autocast, too.
transform  the refined map of bfloat16 rows against what it cannot do without: the refiner's matrix products, plus the
           closed form.

Rows are synthetic: unit vectors of a mean, products of 64 latent factors with a falling spectrum (so that phases are
coupled), and noise; target and source differ in mean and axes. Steps and maps are timed in turn, medians with p20 and
p80. Peak memory of a step is what it holds at most beside weights, averages and the state of AdamW: batch, gradients,
activations, and the recording of a graph; libraries' workspaces are there before. That of a map is what a call
allocates. Results go to
results/<device>_refiner_speed.csv.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_profile import kernels_of

import aniso_ext as aniso
from aniso_ext.align.fitting import FrameOptions, fit_frame
from aniso_ext.align.prior import PhasePrior, fit_prior
from aniso_ext.align.refiner import RefinedMap, RefinementOptions, Refiner
from aniso_ext.align.refiner.fitting import complement_trace, state_moments
from aniso_ext.align.refiner.objective import Objective
from aniso_ext.align.rows import open_rows
from aniso_ext.align.stages import PRIOR_TRAINING, REFINEMENT_TRAINING
from aniso_ext.align.training import TrainingOptions, TrainingRows, UnpairedRows
from aniso_ext.align.training.loop import TrainingRun
from aniso_ext.bench.environment import facts, short_name
from aniso_ext.bench.records import write_table
from aniso_ext.bench.timing import Times, interleaved, synchronize
from aniso_ext.ops import Frame, correct, encode

RESULTS = Path(__file__).resolve().parent / "results"
FACTORS = 64
CHUNK = 65_536
SMALL_ROWS = 20_000
"""Rows that the frame of the step and of the map is fitted on: neither depends on how many there were."""
PARTS = ("fit", "step", "transform")
STEPS = ("ours", "ours, kernel by kernel", "eager", "compiled", "compiled, reduce-overhead")


@dataclass(frozen=True)
class Sizes:
    """Of a run; ``steps`` is None for the default schedules, ``objective`` are options of our objective."""

    rows: int
    width: int
    rank: int
    batches: tuple[int, ...]
    map_rows: int
    rounds: int
    steps: int | None
    variants: tuple[str, ...] = STEPS
    profile: bool = False
    objective: tuple[tuple[str, Any], ...] = ()

    def training(self, default: TrainingOptions) -> TrainingOptions:
        return default if self.steps is None else replace(default, steps=self.steps)


ON_CUDA = Sizes(rows=1_000_000, width=1280, rank=128, batches=(1024, 16_384), map_rows=65_536, rounds=50, steps=None)
ON_CPU = Sizes(rows=3000, width=96, rank=16, batches=(256,), map_rows=2048, rounds=5, steps=60)


def structured_rows(count: int, width: int, side: int, device: torch.device) -> torch.Tensor:
    """[count, width] float16 unit rows on the CPU; ``side`` 0 is the source, 1 the target."""
    axes = torch.Generator(device).manual_seed(1)
    shared = torch.randn(FACTORS, width, generator=axes, device=device) / width**0.5
    generator = torch.Generator(device).manual_seed(10 + side)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mean = 0.5 * normal(width) / width**0.5
    mixed = shared + 0.3 * normal(FACTORS, width) / width**0.5
    mixed *= torch.arange(1, FACTORS + 1, device=device)[:, None] ** -0.5
    rows = torch.empty(count, width, dtype=torch.float16)
    for start in range(0, count, CHUNK):
        factors = normal(min(CHUNK, count - start), FACTORS)
        coupled = factors + 0.5 * factors.roll(1, dims=1) * factors.roll(2, dims=1)
        batch = mean + coupled @ mixed + 0.3 * normal(len(factors), width) / width**0.5
        rows[start : start + CHUNK] = (batch / batch.norm(dim=1, keepdim=True)).half().cpu()
    return rows


class Clock:
    """Seconds of the steps of each stage, from its reports, which come every few steps."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, float]]] = {}
        self.steps: dict[str, tuple[int, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.setdefault(stage, []).append((done, time.perf_counter()))
        self.steps[stage] = (done, total)

    def seconds(self, stage: str) -> float | None:
        """The time between the first and the last report, carried to the steps before the first; None of one report."""
        reports = self.seen.get(stage, [])
        if len(reports) < 2:
            return None
        (first, started), (last, ended) = reports[0], reports[-1]
        return (ended - started) * last / (last - first)


def row(part: str, variant: str, times: Times, **more: Any) -> dict[str, Any]:
    empty = {"precision": "", "rows": 0, "D": 0, "R": 0, "peak_mb": None, "over_ours": None, "note": ""}
    measured = {"seconds": times.median, "p20": times.p20, "p80": times.p80}
    return {"part": part, "variant": variant, **measured, **empty, **more}


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """What a call allocates beyond what is there, in MB; None on the CPU."""
    if device.type != "cuda":
        run()
        return None
    synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_fit(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    source, target = (structured_rows(sizes.rows, sizes.width, side, device) for side in (0, 1))
    clock = Clock()
    aligner = aniso.AnisoAlign(
        rank=sizes.rank,
        device=device,
        prior_training=sizes.training(PRIOR_TRAINING),
        refinement_training=sizes.training(REFINEMENT_TRAINING),
    )
    started = time.perf_counter()
    peak = peak_mb(lambda: aligner.fit(source, target, progress=clock), device)
    seconds = time.perf_counter() - started
    stages = {stage: taken for stage in ("prior", "refiner") if (taken := clock.seconds(stage)) is not None}
    shared = {"rows": sizes.rows, "D": sizes.width, "R": sizes.rank}
    found = [row("fit", "all", Times.of([seconds]), **shared, peak_mb=peak)]
    for stage, taken in stages.items():
        done, total = clock.steps[stage]
        note = f"{done} of {total} steps"
        found.append(row("fit", f"steps of the {stage}", Times.of([taken]), **shared, note=note))
    if len(stages) == 2:
        rest = seconds - sum(stages.values())
        found.append(row("fit", "frame, statistics, survey, calibration", Times.of([rest]), **shared))
    return found


@dataclass(frozen=True)
class Fitted:
    """A frame, a prior and a refiner for steps and maps."""

    frame: Frame
    prior: PhasePrior
    refiner: Refiner
    rows: UnpairedRows
    trace: float


def fitted(sizes: Sizes, device: torch.device) -> Fitted:
    count = min(sizes.rows, SMALL_ROWS)
    sides = [structured_rows(count, sizes.width, side, device) for side in (0, 1)]
    source, target = open_rows(sides[0], "source"), open_rows(sides[1], "target")
    frame, _ = fit_frame(source, target, FrameOptions(sizes.rank, "haar", "scalar", 1024, 0))
    frame = frame.to(device=device)
    prior, _ = fit_prior(target, frame, replace(PRIOR_TRAINING, steps=0), device=device)
    options = RefinementOptions()
    refiner = Refiner(frame.blocks, frame.width, bounds=options.bounds(frame.width)).to(device)
    rows = UnpairedRows(TrainingRows.sample(source, device=device), TrainingRows.sample(target, device=device))
    refiner.standardise(*state_moments(rows.source.train, frame))
    return Fitted(frame, prior, refiner, rows, complement_trace(rows.target.train, frame))


def time_steps(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    ready = fitted(sizes, device)
    for number, batch in enumerate(sizes.batches):
        if device.type != "cuda":
            yield from time_batch(ready, batch, "float32", device, sizes)
            continue
        # a stream other than the default one can be recorded: one stream, one set of workspaces for all
        stream = torch.cuda.Stream(device)
        for precision in ("bfloat16 autocast", "float32") if number == 0 else ("bfloat16 autocast",):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                lines = time_batch(ready, batch, precision, device, sizes)
            yield from lines


def time_batch(
    ready: Fitted, batch: int, precision: str, device: torch.device, sizes: Sizes
) -> list[dict[str, Any]]:
    """Every variant of a step at one size of batch."""
    shared = {"rows": batch, "D": ready.frame.width, "R": ready.frame.rank, "precision": precision}
    options = TrainingOptions(batch_rows=batch, autocast=precision != "float32")
    torch._dynamo.reset()
    settled(refiner_run(ready, options, "eager"), device)  # makes workspaces and cached operands
    runs: dict[str, Callable[[], None]] = {}
    more: dict[str, dict[str, Any]] = {}
    for name in (name for name in sizes.variants if device.type == "cuda" or name != STEPS[-1]):
        before = held(device)
        try:
            loop = refiner_run(ready, options, name, **dict(sizes.objective))
            peak = settled(loop, device)
        except (RuntimeError, AssertionError) as error:
            print(f"step {name} at {batch} rows does not run: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        more[name] = {"peak_mb": None if peak is None else (peak - before - state_bytes(loop)) / 2**20}
        if name == "ours" and device.type == "cuda" and not loop.runner.recorded:
            more[name]["note"] = "not recorded"
        runs[name] = functools.partial(one_step, loop)
    if sizes.profile:
        for name, step in runs.items():
            print(kernels_of(step, f"{name}, {batch} rows, {precision}", device))
    times = interleaved({name: ignoring(step) for name, step in runs.items()}, device, sizes.rounds)
    ours = times["ours"].median if "ours" in times else None
    return [
        row("step", name, measured, **shared, **more[name], over_ours=None if ours is None else measured.median / ours)
        for name, measured in times.items()
    ]


def refiner_run(ready: Fitted, options: TrainingOptions, variant: str, **more: Any) -> TrainingRun:
    """The loop of Stage II on a network of its own; ``more`` are options of our objective."""
    ours = variant.startswith("ours")
    objective = Objective(
        ready.frame,
        ready.prior,
        RefinementOptions(),
        trace=ready.trace,
        literal=False,
        backend="auto" if ours else "reference",
        **(more if ours else {}),
    )
    loss = objective if ours else stock(objective, variant)
    run = TrainingRun(copy.deepcopy(ready.refiner), loss, ready.rows, options, variant, loss, {}, None, None)
    if variant != "ours":
        run.runner.recorder = None
    return run


def stock(objective: Objective, variant: str) -> Any:
    """The loss of all rows together; drawing stays outside of what is compiled, as a generator breaks its graph."""
    at_once = objective.at_once
    if variant != "eager":
        mode = "reduce-overhead" if "reduce-overhead" in variant else None
        at_once = torch.compile(at_once, dynamic=False, mode=mode)

    def loss(refiner: Refiner, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> Any:
        draws = objective.draw(len(batch[0]), generator)
        torch.compiler.cudagraph_mark_step_begin()
        return at_once(refiner, *batch, draws)

    return loss


def one_step(loop: TrainingRun) -> None:
    loop.step = 0  # the batch and the noise of step 0 each time, at the peak of no warm-up
    loop.advance()
    loop._pending.clear()


def held(device: torch.device) -> int:
    """Bytes that tensors take."""
    if device.type != "cuda":
        return 0
    gc.collect()
    synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def settled(loop: TrainingRun, device: torch.device, steps: int = 6) -> int | None:
    """Run steps until all is compiled and recorded; the most bytes that were held after the first one."""
    one_step(loop)
    held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        one_step(loop)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def state_bytes(loop: TrainingRun) -> int:
    """Of what stays from step to step in any variant: weights, averages, AdamW's state."""
    moments = [value for values in loop.optimizer.state.values() for value in values.values()]
    kept = [*loop.module.parameters(), *loop.module.buffers(), *loop.average.values(), *loop.best.values(), *moments]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def ignoring(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda sample: run()


def time_maps(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    ready = fitted(sizes, device)
    given = structured_rows(sizes.map_rows, sizes.width, 0, device).to(device, torch.bfloat16)
    refined = RefinedMap(ready.refiner)
    state, _ = refined.update(given, ready.frame)
    folded = ready.refiner.fold(ready.frame.basis, dtype=state.dtype).to(device)
    single = given if device.type == "cuda" else given.float()  # what the map computes in

    def products() -> object:
        with torch.no_grad():
            return folded(state)

    runs: dict[str, Callable[[], object]] = {
        "refined map": lambda: refined(given, ready.frame),
        "refiner's products": products,
        "closed form": lambda: correct(single, ready.frame),
        "encode": lambda: encode(single, ready.frame),
    }
    peaks = {name: peak_mb(run, device) for name, run in runs.items()}
    times = interleaved({name: ignoring(run) for name, run in runs.items()}, device, sizes.rounds)
    shared = {"rows": sizes.map_rows, "D": sizes.width, "R": sizes.rank, "precision": str(state.dtype)[6:]}
    found = [row("transform", name, times[name], **shared, peak_mb=peaks[name]) for name in runs]
    floor = times["refiner's products"].median + times["closed form"].median
    found[0]["note"] = f"{times['refined map'].median / floor:.3f} x (products + closed form)"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, help="default: results/<device>_refiner_speed.csv")
    parser.add_argument("--batches", type=int, nargs="+", help=f"rows of a step, default on CUDA {ON_CUDA.batches}")
    parser.add_argument("--variants", nargs="+", choices=STEPS, help="of a step, default all")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step and their times")
    parser.add_argument("--chunk-rows", type=int, help="of our objective: rows of the refiner's products at a time")
    parser.add_argument("--polar-rows", type=int, help="of our objective: rows of L_II and L_Phi at a time")
    parser.add_argument("--compiled", action="store_true", default=None, help="of our objective: with torch.compile")
    for name in ("rows", "width", "rank", "map-rows", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, help=f"default on CUDA {getattr(ON_CUDA, name.replace('-', '_'))}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = ON_CUDA if device.type == "cuda" else ON_CPU
    named = {name: value for name in vars(sizes) if (value := getattr(arguments, name, None)) is not None}
    switches = {name: getattr(arguments, name) for name in ("chunk_rows", "polar_rows", "compiled")}
    named["objective"] = tuple((name, value) for name, value in switches.items() if value is not None)
    named |= {name: tuple(value) for name, value in named.items() if isinstance(value, list)}
    sizes = replace(sizes, **named)
    measured: list[dict[str, Any]] = []
    parts: dict[str, Callable[[Sizes, torch.device], Iterable[dict[str, Any]]]] = {
        "fit": time_fit,
        "step": time_steps,
        "transform": time_maps,
    }
    out = arguments.out or RESULTS / f"{short_name(device)}_refiner_speed.csv"
    header = {**facts(device), "rows are": "synthetic, see the head of benchmarks/refiner_speed.py"}
    for part in arguments.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        for line in parts[part](sizes, device):
            measured.append(line)
            write_table(out, header, measured)
            ratio = "" if line["over_ours"] is None else f", {line['over_ours']:.2f} x ours"
            memory = "" if line["peak_mb"] is None else f", {line['peak_mb']:.0f} MB"
            print(f"{part:10s} {line['variant']:40s} {line['rows']:8d} rows {line['precision']:18s} "
                  f"{1e3 * line['seconds']:10.3f} ms{ratio}{memory} {line['note']}", flush=True)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
