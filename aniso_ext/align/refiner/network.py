"""The refiner g: from the state of a row to its bounded update (METHOD section 4, D11-D13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import gelu

from aniso_ext.align.refiner.bounds import Bounds
from aniso_ext.errors import InputError

PREFIX = "refiner."
LEAST_STD = 1e-6
"""Columns of the state that vary less are constant: they are shifted to zero and not blown up."""


class Refiner(nn.Module):
    """Residual MLP on standardised states; zero output before training, so that it starts at the initialisation (D13).

    h = gelu(W_1 (state - mean)/std + b_1); h <- h + gelu(W h + b), ``layers`` times; deltas = W_o h + b_o with W_o = 0
    and b_o = 0 at first. What the deltas may do is decided by ``bounds`` and, in :func:`aniso_ext.ops.decode`, by tanh.

    Args:
        blocks: M.
        width: D.
        hidden: width of the hidden layers; 2D by default.
        layers: residual hidden layers after the first one.
        bounds: a_theta, a_rho and a_v of the update, kept with the weights that were trained under them.
        literal: the projection of dv comes before the tanh, as printed (METHOD D11).
        seed: of the first weights. The global random state is left alone.

    Input: [n, 3M + D] = [sin theta0; cos theta0; log rho0; v0], as :func:`aniso_ext.ops.encode` returns it. Output:
    [n, 2M + D] = [dtheta; drho; dv], for :func:`aniso_ext.ops.decode`.

    Example:
        >>> import torch
        >>> refiner = Refiner(2, 8, bounds=Bounds(0.1, 0.1, 0.035))
        >>> refiner(torch.randn(5, 14)).abs().max().item()
        0.0
    """

    first: nn.Linear
    hidden: nn.ModuleList
    last: nn.Linear
    input_mean: torch.Tensor
    input_std: torch.Tensor

    def __init__(
        self,
        blocks: int,
        width: int,
        *,
        hidden: int | None = None,
        layers: int = 1,
        bounds: Bounds,
        literal: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.blocks, self.width, self.bounds, self.literal = blocks, width, bounds, literal
        hidden = 2 * width if hidden is None else hidden
        states = 3 * blocks + width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(states, hidden)
            self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
            self.last = nn.Linear(hidden, 2 * blocks + width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("input_mean", torch.zeros(states))
        self.register_buffer("input_std", torch.ones(states))

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Take the mean and standard deviation [3M + D] of the states of a corpus."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where(std > LEAST_STD, std, 1))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Deltas [n, 2M + D] of states [n, 3M + D]."""
        return _layers((state - self.input_mean).div_(self.input_std), self)

    def fold(self, basis: torch.Tensor, *, dtype: torch.dtype | None = None) -> FoldedRefiner:
        """The same map for inference: standardisation folded into the first layer, a projection into the last.

        W_1 <- W_1 diag(1/std), b_1 <- b_1 - W_1 mean/std; in the literal order dv <- (I - QQ^T) dv as well, which is
        linear in the last layer (METHOD D13). Products of the fold are float64.

        Args:
            basis: Q, [D, R].
            dtype: of the folded weights; theirs by default.
        """
        return FoldedRefiner(self, basis.double().to(self.input_mean.device), dtype or self.first.weight.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that decides the map, on the CPU, by names that start with ``refiner.``."""
        tensors = {PREFIX + name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        bounds = (self.bounds.a_theta, self.bounds.a_rho, self.bounds.a_v)
        tensors[PREFIX + "bounds"] = torch.tensor(bounds, dtype=torch.float64)
        tensors[PREFIX + "projects_first"] = torch.tensor([self.literal])
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], *, blocks: int, width: int) -> Refiner:
        """The refiner that :meth:`tensors` wrote, frozen; names that do not start with ``refiner.`` are left alone.

        Raises:
            InputError: a tensor is missing or unknown, or its dtype, shape or values do not fit; the message names it.
        """
        parts = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        bounds, literal = _read_bounds(parts), _read_order(parts)
        first = _part(parts, "first.weight")
        if first.dim() != 2 or len(first) < 1:
            raise InputError(f"{PREFIX}first.weight must be [hidden, 3M + D], got shape {list(first.shape)}")
        layers = sum(name.startswith("hidden.") and name.endswith(".weight") for name in parts)
        refiner = cls(blocks, width, hidden=len(first), layers=layers, bounds=bounds, literal=literal)
        expected = refiner.state_dict()
        unknown = sorted(PREFIX + name for name in set(parts) - set(expected))
        if unknown:
            raise InputError(f"unknown {', '.join(unknown)}")
        for name, value in expected.items():
            _check_part(name, _part(parts, name), value)
        if bool((parts["input_std"] <= 0).any()):
            raise InputError(f"{PREFIX}input_std must be positive")
        refiner.load_state_dict(parts)
        return refiner.requires_grad_(False).eval()


class FoldedRefiner(nn.Module):
    """What :meth:`Refiner.fold` returns: three products and two activations, no gradient."""

    first: nn.Linear
    hidden: nn.ModuleList
    last: nn.Linear

    def __init__(self, refiner: Refiner, basis: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        mean, std = refiner.input_mean.double(), refiner.input_std.double()
        weight = refiner.first.weight.detach().double() / std
        self.first = _linear(weight, refiner.first.bias.detach().double() - weight @ mean, dtype)
        self.hidden = nn.ModuleList(
            _linear(layer.get_parameter("weight"), layer.get_parameter("bias"), dtype) for layer in refiner.hidden
        )
        weight, bias = refiner.last.weight.detach().double(), refiner.last.bias.detach().double()
        if refiner.literal:
            polar = 2 * refiner.blocks
            moves, offset = weight[polar:], bias[polar:]
            weight = torch.cat((weight[:polar], moves - basis @ (basis.T @ moves)))
            bias = torch.cat((bias[:polar], offset - basis @ (basis.T @ offset)))
        self.last = _linear(weight, bias, dtype)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Deltas [n, 2M + D] of states [n, 3M + D]."""
        return _layers(state, self)


def _layers(rows: torch.Tensor, network: Refiner | FoldedRefiner) -> torch.Tensor:
    rows = gelu(network.first(rows))
    for layer in network.hidden:
        rows = rows + gelu(layer(rows))
    deltas: torch.Tensor = network.last(rows)
    return deltas


def _linear(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer


def _part(parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parts:
        raise InputError(f"{PREFIX}{name} is missing")
    return parts[name]


def _check_part(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.shape != like.shape:
        raise InputError(f"{PREFIX}{name} has shape {list(value.shape)}, expected {list(like.shape)}")
    if value.dtype != like.dtype:
        raise InputError(f"{PREFIX}{name} is {value.dtype}, expected {like.dtype}")
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise InputError(f"{PREFIX}{name} has {bad} non-finite values")


def _read_bounds(parts: dict[str, torch.Tensor]) -> Bounds:
    value = _part(parts, "bounds")
    _check_part("bounds", value, torch.empty(3, dtype=torch.float64))
    del parts["bounds"]
    try:
        return Bounds(*value.tolist())
    except InputError as error:
        raise InputError(f"{PREFIX}bounds: {error}") from None


def _read_order(parts: dict[str, torch.Tensor]) -> bool:
    value = _part(parts, "projects_first")
    _check_part("projects_first", value, torch.empty(1, dtype=torch.bool))
    return bool(parts.pop("projects_first"))
