"""Weights that are sharded over processes (FSDP2), and the whole model from their last state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aniso_ext.errors import InputError
from aniso_ext.mllm.library import transformers
from aniso_ext.mllm.model import AnisoMLLMForCausalLM


class ShardingTrainer(transformers.Trainer):
    """A trainer that shards on CPU processes too.

    accelerate shards on GPUs and their like alone, and copies weights on CPU processes without a word. Its sharding is
    PyTorch's, which knows no such difference.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        from accelerate import DistributedType, PartialState
        from accelerate.utils import FullyShardedDataParallelPlugin

        state = self.accelerator.state
        if self.args.fsdp_plugin_args is None or state.distributed_type == DistributedType.FSDP:
            return
        if state.distributed_type != DistributedType.MULTI_CPU:
            raise InputError(
                "sharding needs several processes: start with torchrun --nproc-per-node N, or leave fsdp out"
            )
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.args.bf16:
            plugin.set_mixed_precision("bf16")
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True


def whole_model(sharded: AnisoMLLMForCausalLM, state: str) -> AnisoMLLMForCausalLM:
    """A model with the weights of a saved state, on the CPU; a refiner that was trained comes along."""
    model = AnisoMLLMForCausalLM.from_pretrained(state)
    if sharded.correction is not None:
        correction = sharded.correction.fresh()
        prefix = "correction."
        tuned = {name.removeprefix(prefix): value for name, value in _tensors(Path(state), prefix).items()}
        correction.load_state_dict(tuned)
        model.set_correction(correction)
    return model


def _tensors(folder: Path, prefix: str) -> dict[str, Any]:
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found
