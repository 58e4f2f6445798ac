"""DelTA: token coefficients from which side of the batch a token's gradient is on (arXiv
2605.21467).

With ``v`` the token-gradient proxy of ``trainer.credit.token_states`` and ``A`` the advantage of a
token's rollout, the centroids of both sides are ``mu_side = sum |A| v / sum |A|`` over the tokens
of rollouts with ``A > 0`` and ``A < 0``. A token's margin ``m = |v - mu_other|^2 - |v - mu_own|^2``
says how much it belongs to its own side, ``gamma`` is the (population) standard deviation of the
margins of a side, and ``alpha = sigmoid(m / gamma)`` weights the token in refined centroids. After
the last refinement the coefficient is ``low + (high - low) sigmoid(m / gamma)`` with the margins to
the refined centroids and the ``gamma`` of the last round's; tokens of rollouts with ``A = 0`` get
``low``; all are divided by their mean over the tokens that count. This is what the authors' code
computes (RUCBM/DelTA, whose variances in the distance are ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Sweep = Callable[[], Iterable[tuple[Sequence[int], torch.Tensor]]]
"""Gives every rollout's ``v`` once: row numbers, and their tokens one after the other, ``float32
[tokens, H]``.
"""

_LEAST_VARIANCE = 1e-8  # of the margins, as in the authors' code: equal margins give alpha = 1/2


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How often the centroids are refined, and the range of the coefficients.

    Attributes:
        iterations: ``K`` in the paper; 0 takes the first centroids.
    """

    iterations: int = 1
    low: float = 0.8
    high: float = 1.2


def delta_coefficients(
    sweep: Sweep,
    advantage_R: torch.Tensor,
    lengths: Sequence[int],
    counted: Sequence[bool],
    settings: Refinement,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> list[torch.Tensor]:
    """Coefficients of every rollout's tokens, ``float32 [tokens]`` each, with mean 1 over the
    tokens that count.

    Args:
        sweep: called ``2 (settings.iterations + 1)`` times; one block of it is in memory at a time.
        advantage_R: ``float32 [R]`` of the rollouts, zero allowed.
        lengths, counted: tokens of each rollout, and whether they count; those of a rollout that is
            masked out do not.
        total: sum of a float64 tensor over all processes, which then get the coefficients of one
            common batch.

    Where one of the sides has no token, all coefficients are 1. Sums are in float64.
    """
    sides = _Sides(
        sweep, advantage_R * torch.tensor(counted, device=advantage_R.device), lengths, total
    )
    mu_2H = sides.centroids(None)
    if mu_2H is None:
        return [torch.ones(length, device=advantage_R.device) for length in lengths]
    margins = sides.margins(mu_2H)
    gamma_2 = sides.spread(margins)
    for refinement in range(settings.iterations):
        if refinement:
            gamma_2 = sides.spread(margins)
        mu_2H = sides.centroids(sides.alphas(margins, gamma_2))
        assert mu_2H is not None, "a sigmoid is positive, so no side loses its tokens"
        margins = sides.margins(mu_2H)
    signs = sides.sign_R.tolist()
    raw = [
        settings.low + (settings.high - settings.low) * alpha * abs(sign)
        for alpha, sign in zip(sides.alphas(margins, gamma_2), signs, strict=True)
    ]
    pairs = [
        (float(r.double().sum()), len(r)) for r, counts in zip(raw, counted, strict=True) if counts
    ]
    weight, count = total(
        torch.tensor([sum(w for w, _ in pairs), sum(n for _, n in pairs)], dtype=torch.float64)
    ).tolist()
    return [
        r * (count / weight) if counts else torch.ones_like(r)
        for r, counts in zip(raw, counted, strict=True)
    ]


class _Sides:
    """The tokens of a batch on their two sides, index 0 for ``A > 0`` and 1 for ``A < 0``; ``A =
    0`` is on neither.
    """

    def __init__(
        self,
        sweep: Sweep,
        advantage_R: torch.Tensor,
        lengths: Sequence[int],
        total: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._sweep, self._advantage_R, self._total = sweep, advantage_R, total
        self._lengths = list(lengths)
        self.sign_R = advantage_R.sign()

    def centroids(self, alphas: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        """``mu_side`` ``float32 [2, H]``, with ``alphas`` or without; None if a side has no
        token.
        """
        sums: Any = 0.0
        for rows, proxy_NH in self._sweep():
            weight_N = self._by_token(self._advantage_R, rows)
            if alphas is not None:
                weight_N = weight_N * torch.cat([alphas[row] for row in rows])
            weight_2N = torch.stack([weight_N.clamp(min=0), (-weight_N).clamp(min=0)])
            sums = (
                sums
                + torch.cat(
                    [weight_2N @ proxy_NH, weight_2N.sum(dim=1, keepdim=True)], dim=1
                ).double()
            )
        sums = self._total(sums)
        return None if bool((sums[:, -1] == 0).any()) else (sums[:, :-1] / sums[:, -1:]).float()

    def margins(self, mu_2H: torch.Tensor) -> list[torch.Tensor]:
        """``m`` of every rollout's tokens; linear in ``v``, because ``|v|^2`` cancels in the
        difference.
        """
        margins: list[torch.Tensor] = [torch.empty(0)] * len(self._lengths)
        offset = mu_2H[1].square().sum() - mu_2H[0].square().sum()
        for rows, proxy_NH in self._sweep():
            score_N = proxy_NH @ (2 * (mu_2H[0] - mu_2H[1])) + offset
            for row, score in zip(
                rows, score_N.split([self._lengths[row] for row in rows]), strict=True
            ):
                margins[row] = score * self.sign_R[row]
        return margins

    def spread(self, margins: Sequence[torch.Tensor]) -> torch.Tensor:
        """``gamma`` of both sides, ``float64 [2]``."""
        deviations = []
        for side in (1.0, -1.0):
            own = [
                m.double()
                for m, sign in zip(margins, self.sign_R.tolist(), strict=True)
                if sign == side
            ]
            values = torch.cat(own) if own else torch.empty(0, dtype=torch.float64)
            count, first = self._total(
                torch.tensor([float(len(values)), float(values.sum())], dtype=torch.float64)
            ).tolist()
            squares = self._total((values - first / max(1.0, count)).square().sum()[None].cpu())
            deviations.append(float(squares[0]) / max(1.0, count))
        return torch.tensor(deviations, dtype=torch.float64).clamp(min=_LEAST_VARIANCE).sqrt()

    def alphas(self, margins: Sequence[torch.Tensor], gamma_2: torch.Tensor) -> list[torch.Tensor]:
        """``sigmoid(m / gamma)`` with the ``gamma`` of each rollout's side."""
        positive, negative = gamma_2.tolist()
        signs = self.sign_R.tolist()
        return [
            torch.sigmoid(m / (positive if sign > 0 else negative))
            for m, sign in zip(margins, signs, strict=True)
        ]

    def _by_token(self, value_R: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(list(rows), device=value_R.device)
        sizes = torch.tensor([self._lengths[row] for row in rows], device=value_R.device)
        return value_R[index].repeat_interleave(sizes)
