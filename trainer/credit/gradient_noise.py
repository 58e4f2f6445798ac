"""How noisy the gradient of a step is: its variance over prompts beside its square, from the
gradients of parts of the step.

With the gradient ``G = sum_k g_k`` of a step on ``P`` prompts in ``K`` parts, ``tr = P/(K-1) (K sum
|g_k|^2 - |G|^2)`` is an unbiased estimate of the trace of the covariance of one prompt's gradient,
and ``|G|^2 - tr/P`` one of the square of the true gradient. The ratio of their means over steps is
the gradient noise scale, in prompts (arXiv 1812.06162, appendix A): the number of prompts at which
noise and signal of a step are equal. It does not change when all advantages are multiplied by a
number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GradientParts:
    """Keeps apart the gradients that the parts of a step leave in an optimizer's parameters.

    Memory: a second copy of the gradients. (A sharded model's own parameters may be the gathered
    ones for the moment, which never get a gradient.)
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)
        self._squares: list[float] = []

    def end_part(self) -> None:
        """Move the gradients away, so that the next part's come alone."""
        square = 0.0
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            gradient, parameter.grad = parameter.grad, None
            square += float(_local(gradient).double().square().sum())
            known = self._sums[index]
            self._sums[index] = gradient if known is None else known.add_(gradient)
        self._squares.append(square)

    def end_step(self, prompts: float, total: Callable[..., list[float]]) -> dict[str, float]:
        """Give the whole gradient back to the parameters; what is logged of it. ``total`` sums
        numbers over processes.
        """
        for parameter, gradient in zip(self._parameters, self._sums, strict=True):
            parameter.grad = gradient
        whole = sum(float(_local(g).double().square().sum()) for g in self._sums if g is not None)
        square, parts = total(whole, sum(self._squares))
        count = len(self._squares)
        trace = prompts / (count - 1) * (count * parts - square)
        return {"gradient_noise/trace": trace, "gradient_noise/signal": square - trace / prompts}


def noise_scale(traces: Any, signals: Any) -> float:
    """The gradient noise scale in prompts from the logged numbers of several steps; infinite if no
    signal is left.
    """
    trace, signal = float(sum(traces)), float(sum(signals))
    return trace / signal if signal > 0 else float("inf")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
