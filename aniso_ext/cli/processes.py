"""A command as one of the processes that ``torchrun`` started: their group, and which of them speaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """``first`` writes and prints; ``device`` is where this process computes."""

    first: bool
    device: str | None

    def meet(self) -> None:
        """Wait for all processes; nothing where there is only one."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.barrier()


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[Processes]:
    """Join the group that ``torchrun`` describes in the environment; without it this process is alone.

    ``cuda`` becomes the GPU of the local rank, and gradients then travel by NCCL; otherwise by gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(True, device)
        return
    import torch
    import torch.distributed as dist

    on_gpu = device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank() == 0, device)
    finally:
        dist.destroy_process_group()
