"""What a step of Stage II consists of, counted: products, bytes of everything else, kernels, memory. Needs no GPU.

    python benchmarks/refiner_floor.py

The step runs once on the CPU under bfloat16 autocast, as benchmarks/refiner_speed.py makes it, and every operator is
counted: a matrix product by its flops, everything else by the bytes that it reads and writes. Times are what an H100
would need for the count, at 790 TFLOP/s of dense bfloat16 products, 50 of float32 ones, 3.0 TB/s: no kernel reaches
these, and launches, sorts and waits cost nothing here. "least" is a step of products and optimiser alone, nothing read
twice. Memory is that of live tensors at most, beside weights, averages and moments, the prior and its narrow copy.
Results go to results/refiner_floor.csv.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import refiner_speed
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aniso_ext.align.refiner import objective
from aniso_ext.align.training import TrainingOptions, generator_for
from aniso_ext.bench.environment import facts
from aniso_ext.bench.records import write_table

NARROW_FLOPS, WIDE_FLOPS, BANDWIDTH = 790e12, 50e12, 3.0e12
OUT = Path(__file__).resolve().parent / "results" / "refiner_floor.csv"
VIEWS = {
    *("permute", "slice", "detach", "split", "t", "view", "expand", "unsqueeze", "squeeze", "select", "unbind"),
    *("alias", "transpose", "_unsafe_view", "empty", "new_empty", "empty_like", "_local_scalar_dense", "lift_fresh"),
}
OPTIMISER = {"_fused_adamw_", "_foreach_lerp_", "lerp_", "_foreach_mul_", "_foreach_norm"}


class Count(TorchDispatchMode):
    """Counts of every operator under it."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Counter[str] = Counter()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for found in gc.get_objects():
                if type(found) in (torch.Tensor, torch.nn.Parameter):
                    storage = found.untyped_storage()
                    self._seen[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._hold(out)
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and "::_record" not in func._schema.name and "profiler" not in func._schema.name:
            self._add(name, args, [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)])
        return out

    def _add(self, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        self.sums["kernels"] += 1
        if name in ("mm", "addmm", "addmm_"):
            left, right = (args[:2] if name == "mm" else args[1:3])
            kind = "narrow flops" if left.dtype in (torch.float16, torch.bfloat16) else "wide flops"
            self.sums[kind] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            return
        different = {(item.data_ptr(), item.shape): item.numel() * item.element_size() for item in tensors}
        written = 3 if name == "_fused_adamw_" else 1 if name.endswith("lerp_") else 0  # in place, beside being read
        size = sum(different.values())
        if name == "_fused_adamw_":
            size = size * (4 + written) // 4
        elif written or name == "_foreach_mul_":
            size = size * 3 // 2
        self.sums["optimiser bytes" if name in OPTIMISER else "bytes"] += size

    def _hold(self, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
                self._seen[key] = weakref.ref(storage, lambda _, key=key, size=size: self._release(key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


def counted(ready: refiner_speed.Fitted, batch: int, variant: str) -> Count:
    """One step of a variant, after one that makes the optimiser's state."""
    options = TrainingOptions(batch_rows=batch)
    run = refiner_speed.refiner_run(ready, options, variant, **({"written_out": True} if variant == "ours" else {}))
    for group in run.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    body = run.runner.body
    narrow = mock.patch.object(body, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    # on a GPU narrow factors have a wide sum; the CPU's stand-in widens the factors
    summed = mock.patch.object(objective, "product", lambda left, right, dtype: (left @ right).to(dtype))
    with narrow, summed:
        for _ in range(2):
            with Count() as count:
                body(run.batches.positions(0, batch, 0), generator_for(run.device, 0), 1e-3, 0.01)
    return count


def least(ready: refiner_speed.Fitted, batch: int) -> Counter[str]:
    """Products of refiner and prior, both ways; weights, moments, averages and gradients read and written once."""
    refiner = [layer.weight.numel() for layer in (ready.refiner.first, *ready.refiner.hidden, ready.refiner.last)]
    network = ready.prior.network
    film = sum(value.numel() for name, value in network.named_parameters() if "film.weight" in name)
    prior = sum(value.numel() for value in network.parameters() if value.dim() == 2)
    macs = 3 * sum(refiner) - refiner[0] + 2 * prior - film
    # float32: weights, two moments and averages read and written; bfloat16: gradients written and read
    return Counter({"narrow flops": 2 * batch * macs, "optimiser bytes": sum(refiner) * (4 * 2 * 4 + 2 * 2)})


def line(batch: int, variant: str, sums: Counter[str], peak: int | None) -> dict[str, Any]:
    products = sums["narrow flops"] / NARROW_FLOPS + sums["wide flops"] / WIDE_FLOPS
    rest, optimiser = sums["bytes"] / BANDWIDTH, sums["optimiser bytes"] / BANDWIDTH
    return {
        "rows": batch,
        "variant": variant,
        "kernels": sums["kernels"] or None,
        "narrow_gflop": sums["narrow flops"] / 1e9,
        "wide_gflop": sums["wide flops"] / 1e9,
        "gb": sums["bytes"] / 1e9,
        "optimiser_gb": sums["optimiser bytes"] / 1e9,
        "products_ms": 1e3 * products,
        "rest_ms": 1e3 * rest,
        "optimiser_ms": 1e3 * optimiser,
        "all_ms": 1e3 * (products + rest + optimiser),
        "peak_mb": None if peak is None else peak / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 16_384])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    ready = refiner_speed.fitted(refiner_speed.ON_CUDA, device)
    lines: list[dict[str, Any]] = []
    for batch in arguments.batches:
        lines.append(line(batch, "least", least(ready, batch), None))
        for variant in ("ours", "eager"):
            count = counted(ready, batch, variant)
            lines.append(line(batch, variant, count.sums, count.peak))
        for found in lines[-3:]:
            print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in found.items()), flush=True)
        write_table(arguments.out, {**facts(device), "counted for": "D 1280, R 128"}, lines)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
