"""AdamW on bfloat16 weights that have no float32 copy: how an update is rounded decides how much of
it survives.

All arithmetic of a step is float32, as in the fused AdamW of PyTorch; its moments live in bfloat16,
rounded to nearest, as PyTorch keeps those of bfloat16 parameters. With the weight ``w`` and the
update ``u`` of decoupled weight decay and Adam:

    nearest      w' = nearest(w + u): what is less than half a unit in the last place is lost
    stochastic   w' = one of the two neighbours of w + u, at random, with expectation w + u
    compensated  y = u + c, w' = nearest(w + y), c' = y - (w' - w): Kahan's sum, with the remainder
                 c in bfloat16 (arXiv 2010.06192)

The random bits of stochastic rounding are a function of seed, number of the step, name and element
(``relexkit.extension.random_bits``), so a resumed run, and one in several processes, draws the
same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict, Unpack

import torch

from relexkit.extension import random_bits

_BLOCK = 2**18  # elements whose float32 values are held at a time: they stay in the cache


class AdamWOptions(TypedDict):
    """The options of AdamW."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW whose parameters are bfloat16, whole or sharded along the first axis (``DTensor``).

    Memory: two moments in bfloat16, and a third such copy for ``compensated``.

    Args:
        named_parameters: names belong to the random streams of ``stochastic``.
        rounding: a key of ``ROUNDINGS``.
        seed: of the random streams.
        options: as of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        rounding: str,
        seed: int,
        **options: Unpack[AdamWOptions],
    ):
        self._names = {parameter: name for name, parameter in named_parameters}
        self._round, self._seed = ROUNDINGS[rounding], seed
        self._kept = ["exp_avg", "exp_avg_sq"]
        if rounding == "compensated":
            self._kept.append("compensation")
        self._counts: list[torch.Tensor] = []
        super().__init__(list(self._names), dict(options))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, in place, on every parameter that has a gradient."""
        self._counts = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def lost_and_moved(self) -> tuple[float, float]:
        """Of this process's weights in the last step: how many have an update that is not zero but
        leaves them as they are, rounded to nearest, and how many have one that is not zero.

        Under another rounding the former is what nearest would have lost in that step.
        """
        lost, moved = torch.stack(self._counts).sum(dim=0).tolist() if self._counts else (0, 0)
        return float(lost), float(moved)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in self._kept:
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        count = int(state["step"])
        beta1, beta2 = group["betas"]
        step_size, root = group["lr"] / (1 - beta1**count), (1 - beta2**count) ** 0.5
        weights, gradients = _flat(parameter), _flat(parameter.grad)
        means, squares, *remainders = (_flat(state[name]) for name in self._kept)
        stream, first = f"{self._names[parameter]}:{count}", _first_element(parameter)
        for begin in range(0, len(weights), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            weight, gradient = weights[block].float(), gradients[block].float()
            mean = means[block].float().lerp_(gradient, 1 - beta1)
            square = squares[block].float().mul_(beta2)
            square.addcmul_(gradient, gradient, value=1 - beta2)
            means[block], squares[block] = mean, square
            update = mean.mul_(-step_size).div_(square.sqrt_().div_(root).add_(group["eps"]))
            update.sub_(weight, alpha=group["lr"] * group["weight_decay"])
            moved = update != 0
            lost = moved & ((weight + update).bfloat16() == weights[block])
            self._counts.append(torch.stack([lost.sum(), moved.sum()]))
            start, stop = first + begin, first + begin + len(weight)
            weights[block] = self._round(
                weight,
                update,
                remainders[0][block] if remainders else None,
                lambda start=start, stop=stop: torch.from_numpy(
                    random_bits(self._seed, stream, start, stop)
                ),
            )


def _nearest(
    weight: torch.Tensor, update: torch.Tensor, _: Any, random: Callable[[], torch.Tensor]
) -> torch.Tensor:
    return (weight + update).bfloat16()


def _stochastic(
    weight: torch.Tensor, update: torch.Tensor, _: Any, random: Callable[[], torch.Tensor]
) -> torch.Tensor:
    bits = (weight + update).view(torch.int32)
    bits += random().to(weight.device, torch.int32)
    return bits.bitwise_and_(-0x10000).view(torch.float32).bfloat16()


def _compensated(
    weight: torch.Tensor,
    update: torch.Tensor,
    remainder: torch.Tensor,
    random: Callable[[], torch.Tensor],
) -> torch.Tensor:
    whole = update + remainder
    rounded = (weight + whole).bfloat16()
    remainder.copy_(whole - (rounded - weight))
    return rounded


ROUNDINGS: dict[str, Callable[..., torch.Tensor]] = {
    "nearest": _nearest,
    "stochastic": _stochastic,
    "compensated": _compensated,
}
"""``(weight, update, remainder, random) -> bfloat16 weight``: float32 weight and update, the
bfloat16 remainder of the steps before (changed in place) or None, and sixteen random bits for each
element.
"""


def _flat(tensor: Any) -> torch.Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().view(-1)


def _first_element(parameter: Any) -> int:
    """Where this process's shard begins in the whole parameter; FSDP2 cuts rows as ``torch.chunk``
    does.
    """
    if not hasattr(parameter, "device_mesh"):
        return 0
    rows, mesh = parameter.shape[0], parameter.device_mesh
    begin = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
    return begin * (parameter.numel() // max(1, rows))
