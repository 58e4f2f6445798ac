"""Who gets the credit for a reward: advantages of the rollouts, coefficients of their tokens, and
how both are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from relexkit import RelexkitError
from relexkit.extension import Processes
from relexkit.trainer.credit.advantage import group_advantages, lampo_advantages
from relexkit.trainer.credit.token_share import TokenClasses, add_masses, class_shares, token_masses
from relexkit.trainer.credit.token_states import TokenStates
from relexkit.trainer.credit.token_weighting import Refinement, delta_coefficients
from relexkit.trainer.policy.sampling import Completion, pad_token
from relexkit.trainer.tasks import Problem

if TYPE_CHECKING:
    from relexkit.trainer.config import GRPOConfig


def open_watcher(config: GRPOConfig, model: Any) -> TokenStates | None:
    """What has to be kept of the generation for the options in use, if anything."""
    weighted = config.token_weighting == "delta"
    if not (weighted or config.advantage == "lampo" or config.token_shares):
        return None
    return TokenStates(model, config.temperature, keep_states=weighted)


def rouge_l(problem: Problem, completion: str) -> float:
    """ROUGE-L, the F-measure of the longest common subsequence of words, of a completion against
    the reference solution.

    Raises:
        RelexkitError: the problem has no reference solution.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if problem.reference is None:
        raise RelexkitError(
            f"rouge_weight: problem {problem.key} has no reference solution to compare with; name"
            " the column that holds them as `reference` of the task, or leave rouge_weight at 0"
        )
    return RougeScorer(["rougeL"]).score(problem.reference, completion)["rougeL"].fmeasure


def advantages(
    config: GRPOConfig, reward_PG: torch.Tensor, states: TokenStates | None, processes: Processes
) -> torch.Tensor:
    """Advantages ``float32 [P, G]`` of this process's rollouts."""
    if config.advantage == "lampo":
        assert states is not None, "LamPO needs the log-probabilities of the rollouts"
        whole = [
            logp.mean() if config.lampo_length_normalized else logp.sum() for logp in states.logp
        ]
        return lampo_advantages(
            reward_PG, torch.stack(whole).view(reward_PG.shape).cpu(), config.lampo_temperature
        )

    def gather(own: torch.Tensor) -> torch.Tensor:
        return torch.tensor(processes.gather(own.tolist())).view(-1)

    return group_advantages(reward_PG, config.scale_rewards, gather=gather)


def token_weights(
    config: GRPOConfig,
    policy: Any,
    states: TokenStates | None,
    completions: Sequence[Completion],
    advantage_PG: torch.Tensor,
    counted: Sequence[int],
) -> list[torch.Tensor] | None:
    """Coefficients of every rollout's tokens, or None where all are 1. ``policy`` as in
    ``trainer.loop.train``.
    """
    if config.token_weighting == "none":
        return None
    assert states is not None

    def sweep() -> Any:
        pad = pad_token(policy.tokenizer)
        return states.sweep(
            policy.model, completions, config.micro_batch_tokens, pad, policy.autocast
        )

    def total(values: torch.Tensor) -> torch.Tensor:
        parts = policy.processes.gather(values.tolist())
        return torch.tensor(parts, dtype=torch.float64).sum(dim=0).to(values.device)

    return delta_coefficients(
        sweep,
        advantage_PG.view(-1).to(policy.model.device),
        [len(c.completion_ids) for c in completions],
        [bool(count) for count in counted],
        Refinement(iterations=config.delta_iterations, low=config.delta_min, high=config.delta_max),
        total,
    )


def token_share_metrics(
    states: TokenStates,
    completions: Sequence[Completion],
    advantage_PG: torch.Tensor,
    weights: list[torch.Tensor] | None,
    tokenizer: Any,
    processes: Processes,
) -> dict[str, float]:
    """Share of each class of tokens in ``sum |A| |v|``, and with the coefficients if there are any,
    over all processes.
    """
    norms = [norm.cpu().numpy() for norm in states.norms]
    coefficients = None if weights is None else [weight.cpu().numpy() for weight in weights]
    own = token_masses(
        [c.completion_ids for c in completions], advantage_PG.view(-1).tolist(), norms, coefficients
    )
    masses = add_masses(processes.gather(own))
    classes = TokenClasses(tokenizer)
    shares = {f"token_share/{name}": share for name, share in class_shares(masses, classes).items()}
    if weights is not None:
        weighted = class_shares(masses, classes, weighted=True)
        shares |= {f"token_share_weighted/{name}": share for name, share in weighted.items()}
    return shares


def informativeness(right_PG: torch.Tensor, logp: Sequence[torch.Tensor]) -> dict[str, float]:
    """Sums over the prompts of this process of what tells how much there is to learn from their
    rollouts (G2D, arXiv 2605.21266).

    ``mixed``: prompts with right and wrong rollouts; ``margin``: over these, how much larger the
    mean log-probability of a token is in right rollouts than in wrong ones; ``rate`` and
    ``square``: shares of right rollouts and their squares.

    Args:
        right_PG: 1 where the task calls a rollout right.
        logp: log-probabilities of each rollout's tokens under the policy that sampled it.
    """
    mean_PG = (
        torch.stack([row.mean() if len(row) else row.sum() for row in logp])
        .view(right_PG.shape)
        .cpu()
        .double()
    )
    right_PG = right_PG.double()
    count_P = right_PG.sum(dim=1)
    mixed_P = (count_P > 0) & (count_P < right_PG.shape[1])
    good_P = (mean_PG * right_PG).sum(dim=1) / count_P.clamp(min=1)
    bad_P = (mean_PG * (1 - right_PG)).sum(dim=1) / (right_PG.shape[1] - count_P).clamp(min=1)
    rate_P = right_PG.mean(dim=1)
    sums = {
        "mixed": mixed_P.sum(),
        "margin": ((good_P - bad_P) * mixed_P).sum(),
        "rate": rate_P.sum(),
        "square": rate_P.square().sum(),
    }
    return {name: float(value) for name, value in sums.items()}
