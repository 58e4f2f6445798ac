"""What the policy computed when it drew each token: its probability and the hidden state that went
into the output head.

A rollout passes through the model once to be sampled, and that pass has already computed all that
DelTA, LamPO and the measurements of the token gradient need. Kept are, of every completion token
``t`` with probability ``p`` and hidden state ``h`` (arXiv 2605.21467):

    v = (1 - p) h   the token-gradient proxy
    |v| and log p   one number each

``v`` is the gradient of ``log p`` with respect to the row of ``t`` in the output head.
``p`` is that of the distribution at the sampling temperature, before any cut by ``top_k`` or
``top_p``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from relexkit.trainer.policy.log_probabilities import make_batch, micro_batches, token_logprobs
from relexkit.trainer.policy.sampling import Completion, Watcher

KEPT_BYTES = 2**29
"""Most bytes of ``v`` that a process keeps; those of further rollouts are computed again by a
forward pass when needed.
"""


class TokenStates(Watcher):
    """Collects what ``trainer.policy.sampling.generate`` computes, row by row in the order of its
    prompts.

    Memory: ``KEPT_BYTES`` at most, besides the states of the batch that is being generated (``[B,
    T, H]`` float32: a small part of its key-value cache); none with ``keep_states=False``, which
    leaves ``blocks`` and ``missing`` empty.

    Attributes:
        logp, norms: ``log p`` and ``|v|`` of every row's completion tokens, ``float32 [tokens]``
            each.
        blocks: row numbers, and their ``v`` one after the other, ``float32 [tokens of these rows,
            H]``.
        missing: numbers of the rows whose states did not fit.
    """

    def __init__(self, model: Any, temperature: float, *, keep_states: bool):
        self._head = model.get_output_embeddings()
        self._temperature = temperature
        self._keep_states = keep_states
        self._free = KEPT_BYTES
        self.logp: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.blocks: list[tuple[list[int], torch.Tensor]] = []
        self.missing: list[int] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Watch the generation of one batch; ``finish`` takes what it drew."""
        self._hidden: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        handle = self._head.register_forward_pre_hook(
            lambda _, inputs: self._hidden.append(inputs[0][:, -1].float().clone())
        )
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called as the first logits processor of the generation: keeps the scores of the next
        token, and the log-probability of the last one.
        """
        if self._scores:
            self._scores[-1] = self._log_probability(self._scores[-1], input_ids[:, -1])
        self._scores.append(scores)
        return scores

    def _log_probability(self, scores_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
        scores_BV = scores_BV.float() / self._temperature
        return scores_BV.gather(1, token_B[:, None])[:, 0] - scores_BV.logsumexp(dim=1)

    def finish(self, tokens_BT: torch.Tensor, lengths: Sequence[int]) -> None:
        """Take over a batch: the tokens that it drew ``int64 [B, T]``, and how many of each row
        belong to the completion.
        """
        if self._scores:
            self._scores[-1] = self._log_probability(self._scores[-1], tokens_BT[:, -1])
        logp_BT = torch.stack(self._scores, dim=1)
        hidden_BTH = torch.stack(self._hidden, dim=1)
        proxy_BTH = gradient_proxy(logp_BT, hidden_BTH)
        norm_BT = proxy_BTH.norm(dim=2)
        kept: list[int] = []
        pieces: list[torch.Tensor] = []
        for position, length in enumerate(lengths):
            row = len(self.logp)
            self.logp.append(logp_BT[position, :length].clone())
            self.norms.append(norm_BT[position, :length].clone())
            size = length * proxy_BTH.shape[2] * proxy_BTH.element_size()
            if not self._keep_states:
                continue
            if size > self._free:
                self.missing.append(row)
                continue
            self._free -= size
            kept.append(row)
            pieces.append(proxy_BTH[position, :length])
        if kept:
            self.blocks.append((kept, torch.cat(pieces)))
        self._hidden, self._scores = [], []

    def sweep(
        self,
        model: Any,
        completions: Sequence[Completion],
        max_tokens: int,
        pad: int,
        autocast: bool,
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Every row's ``v`` once, in blocks as those of ``blocks``; those of missing rows are
        computed again by a forward pass.
        """
        yield from self.blocks
        for group in micro_batches([completions[row] for row in self.missing], max_tokens):
            rows = [self.missing[index] for index in group]
            batch = make_batch([completions[row] for row in rows], pad, model.device)
            seen: list[torch.Tensor] = []
            handle = self._head.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0][:, :-1].float())
            )
            try:
                with torch.no_grad():
                    logp_BT, _ = token_logprobs(model, batch, self._temperature, autocast)
            finally:
                handle.remove()
            proxy_BTH = gradient_proxy(logp_BT, seen[0])
            yield (
                rows,
                torch.cat(
                    [
                        v[: len(completions[r].completion_ids)]
                        for r, v in zip(rows, proxy_BTH, strict=True)
                    ]
                ),
            )


def gradient_proxy(logp_BT: torch.Tensor, hidden_BTH: torch.Tensor) -> torch.Tensor:
    """``v = (1 - p) h`` of every token, ``[B, T, H]``."""
    return -torch.expm1(logp_BT)[..., None] * hidden_BTH
