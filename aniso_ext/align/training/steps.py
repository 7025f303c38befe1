"""One optimiser step, and its replay as a CUDA graph: small batches are bound by the launches of their kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from aniso_ext.align.processes import average, generator_for, seed_for, world

GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm, over all parameters."""
WARM_UP_STEPS = 3
"""Steps before the recording: libraries make their handles and kernels in them, the optimiser its state."""
Number = float | torch.Tensor


class Differentiated(Protocol):
    """A loss that may bring its gradients along; as a function it is a loss like any other."""

    def with_gradients(
        self, module: Any, take: Callable[[], Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor], list[torch.Tensor] | None]:
        """The loss, its parts, and its gradients to what is trained, in order; None leaves them to autograd.

        ``take`` makes the batch: nobody else holds it. Gradients may be narrower than what they belong to.
        """


class OptimiserStep:
    """Loss, gradients, clipping, AdamW and averaged weights of one step, kernel by kernel.

    What differs from step to step comes in as arguments, so that the same step can be recorded with all of them on the
    device.

    Args:
        module, loss: as for :func:`aniso_ext.align.training.train`; a loss that is :class:`Differentiated` is asked for
            its gradients.
        parameters: what is trained.
        averages: of the parameters, in their order.
        optimizer: over the parameters.
        autocast: bfloat16 products, on CUDA.
        gather: makes the batch of what the step is called with; None where that is the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
        parameters: Sequence[torch.Tensor],
        averages: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        autocast: bool,
        gather: Callable[[Any], Any] | None = None,
    ) -> None:
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self.parameters: list[torch.Tensor] = list(parameters)
        self.averages = list(averages)
        self.device = self.parameters[0].device
        self._autocast = autocast and self.device.type == "cuda"
        self._gather = gather

    def __call__(
        self, batch: Any, generator: torch.Generator, rate: Number, weight: Number
    ) -> dict[str, torch.Tensor]:
        """The loss of the step and its parts; ``rate`` is that of AdamW, ``weight`` that of the new average."""
        self.forget_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        values, narrow = self._differentiate(batch, generator)
        if narrow:
            self._update_in_groups(narrow)
        else:
            average([*(item.grad for item in self.parameters if item.grad is not None), *values.values()])
            nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
            self.optimizer.step()
        with torch.no_grad():
            if isinstance(weight, torch.Tensor):
                for mean, parameter in zip(self.averages, self.parameters, strict=True):
                    mean.lerp_(parameter, weight)
            else:
                torch._foreach_lerp_(self.averages, self.parameters, weight)
        return values

    def _differentiate(
        self, batch: Any, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Values of the loss; gradients lie with the parameters, or are returned where they are narrower than these."""

        def take() -> Any:
            return batch if self._gather is None else self._gather(batch)

        gradients: list[torch.Tensor] | None = None
        with self.autocast():
            if hasattr(self.loss, "with_gradients"):
                value, parts, gradients = self.loss.with_gradients(self.module, take, generator)
            else:
                value, parts = self.loss(self.module, take(), generator)
        if gradients is None:
            value.backward()
        # copies: what the loss and its parts hold is not needed by the optimiser
        values = {"loss": value.detach().clone(), **{key: part.detach().clone() for key, part in parts.items()}}
        if gradients is None:
            return values, []
        pairs = list(zip(self.parameters, gradients, strict=True))
        if world()[1] == 1 and any(parameter.dtype != gradient.dtype for parameter, gradient in pairs):
            return values, gradients
        for parameter, gradient in pairs:
            parameter.grad = gradient.to(parameter.dtype)
        return values, []

    def _update_in_groups(self, gradients: list[torch.Tensor]) -> None:
        """Clip and step with narrow gradients, which are widened a few at a time and given back; empties the list."""
        norm = torch.stack([torch.linalg.vector_norm(item, dtype=torch.float32) for item in gradients]).norm()
        # of one dimension, so that the product with it is as wide as it is
        scale = (GRADIENT_NORM / (norm + 1e-6)).clamp_max(1).reshape(1)
        waiting = dict(enumerate(gradients))
        gradients.clear()
        for indices in self._groups():
            for index in indices:
                self.parameters[index].grad = waiting.pop(index) * scale
            self.optimizer.step()
            self.forget_gradients()

    def _groups(self) -> list[list[int]]:
        """Parameters that step together: the largest one alone, as many of the others as are no larger than it."""
        sizes = [parameter.numel() for parameter in self.parameters]
        groups: list[list[int]] = []
        room = 0
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            if sizes[index] > room:
                groups.append([])
                room = max(sizes)
            groups[-1].append(index)
            room -= sizes[index]
        return groups

    def forget_gradients(self) -> None:
        """Give their memory back before the next forward pass."""
        for parameter in self.parameters:
            parameter.grad = None

    def autocast(self) -> Any:
        """The context of every forward pass."""
        return torch.autocast("cuda", dtype=torch.bfloat16) if self._autocast else nullcontext()


class Recorder(Protocol):
    """Turns a function of fixed inputs into a replay that a host call starts as a whole."""

    def record(
        self, body: Callable[[], torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        """The output of ``body`` and a function that computes it anew, in place, from what its inputs hold then.

        Draws follow the state that ``generator`` has at the replay.

        Raises:
            RuntimeError: the function cannot be recorded; the message says why.
        """


class CudaGraphs:
    """Records as CUDA graphs. What a body computes is computed by the replays alone, not by the recording."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(
        self, body: Callable[[], torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            current = torch.cuda.current_stream()
            usable = current != torch.cuda.default_stream()
            # other threads may use the device meanwhile, as those of a progress display or of another fit
            with torch.cuda.graph(
                graph, stream=current if usable else torch.cuda.Stream(), capture_error_mode="thread_local"
            ):
                output = body()
        return output, graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """CUDA graphs on a GPU. None elsewhere, and for several processes, whose all-reduces are not recorded."""
    return CudaGraphs(device) if device.type == "cuda" and world()[1] == 1 else None


class StepRunner:
    """Runs steps: the first ones kernel by kernel, the others as replays of one recording where there is a recorder.

    A recorded step does what the step does: same batches, draws, rates. Batches of another shape than the recorded one
    run kernel by kernel, and so does everything after a recording that failed, with a warning that says why.

    Args:
        body: the step.
        name: of the stage, in the warning.
        recorder: None records nothing.
    """

    def __init__(self, body: OptimiserStep, name: str, recorder: Recorder | None) -> None:
        self.body, self.name, self.recorder = body, name, recorder
        self._done = 0
        self._recording: _Recording | None = None

    def __call__(self, batch: Any, key: Sequence[int], rate: float, weight: float) -> dict[str, torch.Tensor]:
        """Values of one step on ``batch``; its random numbers are a function of ``key``."""
        if self.recorder is not None and self._recording is None and self._done >= WARM_UP_STEPS:
            self._record(batch, self.recorder)
        self._done += 1
        if self._recording is not None and self._recording.fits(batch):
            return self._recording.replay(batch, seed_for(*key), rate, weight)
        device = self.body.device
        if device.type == "cuda":  # fused AdamW reads a rate on the device as float32: the same rate in every step
            return self.body(batch, generator_for(device, *key), _single(rate), _single(weight))
        return self.body(batch, generator_for(device, *key), rate, weight)

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recording is not None

    def release(self) -> None:
        """Give back the gradients and what the recording holds."""
        self._recording = None
        self.body.forget_gradients()

    def _record(self, batch: Any, recorder: Recorder) -> None:
        self._set_capturable(self.body.device.type == "cuda")
        try:
            self._recording = _Recording(self.body, batch, recorder)
        except RuntimeError as error:
            self.recorder = None
            self._set_capturable(False)
            self.body.forget_gradients()
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"{self.name}: the training step cannot be recorded as a CUDA graph ({reason}): it runs kernel by "
                "kernel, with the same result but slower",
                stacklevel=2,
            )

    def _set_capturable(self, value: bool) -> None:
        """Tell AdamW; not before the recording, as it warns of steps that could be recorded and are not."""
        for group in self.body.optimizer.param_groups:
            group["capturable"] = value


class _Recording:
    """A recorded step with the places its inputs are put in."""

    def __init__(self, body: OptimiserStep, batch: Any, recorder: Recorder) -> None:
        self._generator = torch.Generator(body.device)
        self._inputs = [tensor.clone() for tensor in _tensors(batch)]
        self._rate, self._weight = (torch.zeros((), device=body.device) for _ in range(2))
        self._names: list[str] = []
        given = tuple(self._inputs) if isinstance(batch, (tuple, list)) else self._inputs[0]

        def step() -> torch.Tensor:
            values = body(given, self._generator, self._rate, self._weight)
            self._names = list(values)
            return torch.stack(list(values.values()))

        body.forget_gradients()
        self._values, self._start = recorder.record(step, self._generator)

    def fits(self, batch: Any) -> bool:
        """Whether the batch has the shapes and dtypes of the recorded one."""
        return [_form(tensor) for tensor in _tensors(batch)] == [_form(tensor) for tensor in self._inputs]

    def replay(self, batch: Any, seed: int, rate: float, weight: float) -> dict[str, torch.Tensor]:
        for place, tensor in zip(self._inputs, _tensors(batch), strict=True):
            place.copy_(tensor)
        self._generator.manual_seed(seed)
        self._rate.fill_(rate)
        self._weight.fill_(weight)
        self._start()
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))


def _tensors(batch: Any) -> Sequence[torch.Tensor]:
    return batch if isinstance(batch, (tuple, list)) else (batch,)


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
