"""What the processes of ``torchrun`` share: statistics, averaged gradients, draws for the global batch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aniso_ext.errors import InputError


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of(rows: int) -> tuple[int, int]:
    """First and last + 1 of this process's rows of a global batch; what does not divide is left out."""
    rank, processes = world()
    size = rows // processes
    return rank * size, (rank + 1) * size


def check_batch_rows(batch_rows: int) -> None:
    """Refuse a global batch that cannot be divided evenly."""
    processes = world()[1]
    if batch_rows % processes:
        raise InputError(f"batch_rows {batch_rows} must be a multiple of the {processes} processes")


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one all-reduce of a flat float32 (or wider) copy."""
    processes = world()[1]
    if processes == 1 or not tensors:
        return
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= processes
    _scatter(flat, tensors)


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the tensors of process 0, in one broadcast."""
    if world()[1] == 1 or not tensors:
        return
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
    dist.broadcast(flat, src=0)
    _scatter(flat, tensors)


def gather(own: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes in order of rank; their first dimensions may differ, the rest may not."""
    processes = world()[1]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # As bytes, because not every backend knows every dtype.
    flat = own.contiguous().view(-1).view(torch.uint8).to(device)
    size = torch.tensor([flat.numel()], device=device)
    sizes = [torch.empty_like(size) for _ in range(processes)]
    dist.all_gather(sizes, size)
    longest = max(int(found) for found in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(processes)]
    dist.all_gather(parts, torch.nn.functional.pad(flat, (0, longest - flat.numel())))
    rest = own.shape[1:]
    return [
        part[: int(found)].to(own.device).view(own.dtype).view(-1, *rest)
        for part, found in zip(parts, sizes, strict=True)
    ]


def gather_states(state: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """The saved states (integers and arrays) of all processes in order of rank."""
    file = io.BytesIO()
    np.savez(file, **state)
    states = []
    for part in gather(torch.frombuffer(file.getbuffer(), dtype=torch.uint8)):
        with np.load(io.BytesIO(part.numpy().tobytes()), allow_pickle=False) as arrays:
            states.append(dict(arrays))
    return states


def _scatter(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A generator that is a function of the key alone, the same on every process."""
    return torch.Generator(device).manual_seed(seed_for(*key))


def seed_for(*key: int) -> int:
    """The seed of that generator."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1


def global_normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal [rows, columns] on the generator's device: this process's share of a draw for the global batch.

    Several processes that hold the rows of a batch in shares see the noise that one process would see.
    """
    rank, processes = world()
    draw = torch.randn(rows * processes, columns, generator=generator, device=generator.device)
    return draw[rank * rows : (rank + 1) * rows]


def global_uniform(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform [rows, 1] in [0, 1), shared out as in :func:`global_normal`."""
    rank, processes = world()
    draw = torch.rand(rows * processes, 1, generator=generator, device=generator.device)
    return draw[rank * rows : (rank + 1) * rows]
