"""Speed of text-only training: how near a step comes to the machine's matrix products, and what is ours of it.

    python benchmarks/mllm_speed.py                   # about 1B parameters on a GPU
    python benchmarks/mllm_speed.py --small           # tiny, for the CPU
    python benchmarks/mllm_speed.py --attention flex_attention

full       steps of the full stage as `aniso train --packing` runs them: Llama of --size, rows of --length tokens packed
           with samples of 40 to 400, AdamW, and stand-ins of a refined AnisoAlign made on the fly. MFU is 6 operations
           for each weight (embedding table aside) and token plus 12 * width * layers for each pair of a token and one
           that it sees, over seconds times the rate of a matrix product measured here. `ours` is the time within the
           correction, forward; `ours, refiner trained` is its forward and backward pass alone, over the same step.
projector  steps of the projector stage on captions with one visual token, and with 576 that repeat what one says.

Weights and rows are random: neither changes a time. Steps are medians with p20 and p80 after the first few. Results go
to results/<device>_mllm_speed.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import aniso_ext as aniso
from aniso_ext.align import TrainingOptions
from aniso_ext.bench import ceilings
from aniso_ext.bench.environment import facts, short_name
from aniso_ext.bench.records import write_table
from aniso_ext.bench.timing import Times, interleaved, synchronize

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from aniso_ext.mllm import (
    AnisoMLLMForCausalLM,
    Correction,
    TrainOptions,
    small_language_model,
    small_tokenizer,
    train,
)
from aniso_ext.mllm.library import say_errors_alone

RESULTS = Path(__file__).resolve().parent / "results"
VISUAL_TOKENS = (1, 576)
FRAMING = 15
"""Tokens of a sample that are not its caption, about."""
FIRST_STEPS = 3
"""Left out of the medians: memory is found and kernels are chosen in them."""


@dataclass(frozen=True)
class Sizes:
    """Of a run; ``batch`` is rows of a packed step, ``captions`` samples of a step of the projector stage."""

    size: str
    vocabulary: int
    length: int
    batch: int
    captions: int
    steps: int
    width: int
    rank: int
    samples: tuple[int, int] = (40, 400)


LARGE = Sizes(size="1b", vocabulary=32_000, length=2048, batch=4, captions=32, steps=15, width=1280, rank=128)
SMALL = Sizes(size="tiny", vocabulary=512, length=128, batch=2, captions=4, steps=6, width=32, rank=8, samples=(20, 60))


@dataclass
class World:
    """What all parts train on."""

    sizes: Sizes
    device: torch.device
    attention: str | None
    compile: bool
    rows: np.ndarray
    aligner: aniso.AnisoAlign
    tokenizer: Any

    @classmethod
    def make(cls, sizes: Sizes, device: torch.device, attention: str | None, compile: bool) -> World:
        random = np.random.default_rng(0)
        rows = random.standard_normal((4000, sizes.width)).astype(np.float32) + 0.5
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        short = TrainingOptions(steps=4, batch_rows=256, warmup_steps=0)
        aligner = aniso.AnisoAlign(rank=sizes.rank, prior_training=short, refinement_training=short)
        aligner.fit(rows, -rows[::-1].copy())
        words = [chr(97 + first) + chr(97 + second) for first in range(26) for second in range(26)]
        return cls(sizes, device, attention, compile, rows, aligner, small_tokenizer(words, 300))

    def model(self, repeated: int = 1) -> AnisoMLLMForCausalLM:
        model = small_language_model(vocab_size=self.sizes.vocabulary, size=self.sizes.size)
        made = AnisoMLLMForCausalLM.from_language_model(
            model, self.tokenizer, embedding_width=self.sizes.width
        )
        if repeated > 1:
            made.projector, made.config.visual_tokens = Repeated(made.projector, repeated), repeated
        made.set_correction(Correction(self.aligner))
        return made

    def captions(self, count: int, shortest: int, longest: int) -> list[dict[str, str]]:
        """Samples of about so many tokens, two letters and a space being about two."""
        random = np.random.default_rng(1)
        texts = []
        for _ in range(count):
            words = random.integers(97, 123, (int(random.integers(shortest, longest + 1)) // 2, 2)).astype(np.uint8)
            texts.append(" ".join(bytes(word).decode() for word in words))
        return [{"id": str(number), "caption": text} for number, text in enumerate(texts)]


class Repeated(nn.Module):
    """One token, ``times`` over: what 576 visual tokens of a single vector are."""

    def __init__(self, projector: nn.Module, times: int) -> None:
        super().__init__()
        self.projector, self.times = projector, times

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.projector(embeddings)
        return tokens.expand(-1, self.times, -1)


class Stopwatch:
    """Seconds of each step, and of the correction within it."""

    def __init__(self, model: AnisoMLLMForCausalLM, device: torch.device) -> None:
        self.ends: list[float] = []
        self.device = device
        self.spans: list[tuple[Any, Any]] = []
        correction = model.correction
        assert correction is not None
        correction.register_forward_pre_hook(lambda *_: self.spans.append((self._mark(), None)))
        correction.register_forward_hook(lambda *_: self._close())

    def __call__(self, stage: str, done: int, total: int) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def steps(self) -> Times:
        return Times.of(np.diff(self.ends[FIRST_STEPS - 1 :]).tolist())

    def ours(self) -> float:
        """Median seconds of the correction in a step: as many calls as fall on one."""
        synchronize(self.device)
        seconds = [
            first.elapsed_time(last) / 1e3 if self.device.type == "cuda" else last - first for first, last in self.spans
        ]
        calls = len(seconds) // len(self.ends)
        return float(np.median(seconds[FIRST_STEPS * calls :])) * calls

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self) -> None:
        self.spans[-1] = (self.spans[-1][0], self._mark())


@contextmanager
def output() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def timed(world: World, model: AnisoMLLMForCausalLM, samples: list[dict[str, str]], options: TrainOptions) -> Any:
    """The stopwatch and the report of a training, and the sum of the squared lengths of its samples."""
    watch = Stopwatch(model, world.device)
    ids = [str(number) for number in range(len(world.rows))]
    with output() as folder:
        report = train(
            model, world.tokenizer, samples, world.rows, index=ids, options=options, output=folder, progress=watch
        )
        ends = np.load(folder / "samples" / "ends.npy")
    return watch, report, float((np.diff(ends, prepend=0).astype(np.float64) ** 2).sum())


def line(part: str, variant: str, times: Times, **more: Any) -> dict[str, Any]:
    empty = {"tokens": None, "samples": None, "tflop_per_s": None, "mfu": None, "share": None, "peak_mb": None}
    measured = {"seconds": times.median, "p20": times.p20, "p80": times.p80, "steps_per_s": 1 / times.median}
    return {"part": part, "variant": variant, **measured, **empty, **more}


def time_full(world: World) -> list[dict[str, Any]]:
    sizes = world.sizes
    model = world.model()
    samples = world.captions(len(world.rows), *sizes.samples)
    mean = np.mean([len(world.tokenizer(sample["caption"]).input_ids) + FRAMING for sample in samples[:200]])
    # packs are nearly full, so this many samples are a step of `batch` rows
    step_samples = max(1, int(0.95 * sizes.batch * sizes.length / mean))
    samples = samples[: sizes.steps * step_samples]
    options = TrainOptions(
        stages=("full",), packing=True, max_length=sizes.length, max_steps=sizes.steps, attention=world.attention,
        compile=world.compile, global_batch=step_samples, device_batch=sizes.batch,
        save_every=10**6, device=world.device.type,
    )  # fmt: skip
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch, report, squares = timed(world, model, samples, options)
    peak = torch.cuda.max_memory_allocated() / 2**20 if world.device.type == "cuda" else None
    share_of_pass = report.stages[0].rows_per_step / report.rows
    config = model.config.text_config
    tokens = report.tokens * share_of_pass
    counted = sum(value.numel() for value in model.language_model.parameters()) - config.vocab_size * config.hidden_size
    pairs = squares / 2 * share_of_pass
    operations = 6 * counted * tokens + 12 * config.hidden_size * config.num_hidden_layers * pairs
    step = watch.steps()
    peak_rate = ceilings.measure(world.device, ("bf16" if world.device.type == "cuda" else "fp32",)).gemm_tflop_per_s
    (ceiling,) = peak_rate.values()
    rate = operations / step.median / 1e12
    shared = {"tokens": round(tokens), "samples": round(report.samples * share_of_pass)}
    found = [
        line("full", "step", step, **shared, tflop_per_s=rate, mfu=rate / ceiling, peak_mb=peak),
        line("full", "ours", Times.of([watch.ours()]), **shared, share=watch.ours() / step.median),
    ]
    trained = trained_correction(world, shared["samples"])
    return [*found, line("full", "ours, refiner trained", trained, **shared, share=trained.median / step.median)]


def trained_correction(world: World, count: int) -> Times:
    """Forward and backward of a correction whose refiner takes gradients, on ``count`` rows."""
    correction = Correction(world.aligner, trainable=True).to(world.device)
    rows = torch.from_numpy(np.resize(world.rows, (count, world.sizes.width))).to(world.device)

    def run(_: int) -> None:
        correction(rows).sum().backward()

    return interleaved({"ours": run}, world.device, 10)["ours"]


def time_projector(world: World) -> list[dict[str, Any]]:
    sizes, found = world.sizes, []
    samples = world.captions(sizes.captions * sizes.steps, 20, 40)
    for visual_tokens in VISUAL_TOKENS:
        model = world.model(visual_tokens)
        options = TrainOptions(
            stages=("projector",), max_steps=sizes.steps, global_batch=sizes.captions, device_batch=sizes.captions,
            attention=world.attention, compile=world.compile, save_every=10**6, device=world.device.type,
        )  # fmt: skip
        watch, _, _ = timed(world, model, samples, options)
        found.append(line("projector", f"{visual_tokens} visual tokens", watch.steps(), samples=sizes.captions))
        del model
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("full", "projector"), default=["full", "projector"])
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--attention", help="of the language model, e.g. sdpa, flex_attention")
    parser.add_argument("--compile", action="store_true", help="the layers of the language model")
    parser.add_argument("--batch", type=int, help="packed rows of a step")
    parser.add_argument("--steps", type=int, help="steps of each part")
    parser.add_argument("--out", type=Path, help="default: results/<device>_mllm_speed.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    named = {name: getattr(arguments, name) for name in ("batch", "steps") if getattr(arguments, name) is not None}
    sizes = replace(SMALL if arguments.small else LARGE, **named)
    if sizes.steps < FIRST_STEPS + 2:
        parser.error(f"--steps must be at least {FIRST_STEPS + 2}, the first {FIRST_STEPS} are not counted")
    say_errors_alone()
    world = World.make(sizes, device, arguments.attention, arguments.compile)
    measured: list[dict[str, Any]] = []
    parts = {"full": time_full, "projector": time_projector}
    out = arguments.out or RESULTS / f"{short_name(device)}_mllm_speed.csv"
    header = {**facts(device), "model": sizes.size, "length": str(sizes.length), "attention": arguments.attention or ""}
    header["compiled"] = "layers" if arguments.compile else "no"
    print(f"{'':36s} {'ms':>10s} {'steps/s':>9s} {'TFLOP/s':>9s} {'MFU':>7s} {'share':>7s}")
    for part in arguments.parts:
        found = parts[part](world)
        measured += found
        write_table(out, header, measured)
        for item in found:
            cells = [f"{1e3 * item['seconds']:10.2f}", f"{item['steps_per_s']:9.2f}"]
            cells += ["" if item["tflop_per_s"] is None else f"{item['tflop_per_s']:9.1f}"]
            cells += ["" if item[name] is None else f"{name} {item[name]:.2%}" for name in ("mfu", "share")]
            print(f"{item['part'] + ', ' + item['variant']:36s} {' '.join(cells)}", flush=True)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
