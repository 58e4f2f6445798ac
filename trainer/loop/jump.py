"""Jumps inside the training: to what the run's own record predicts, kept or taken back by the
rewards of the rollouts that follow (docs/jumps.md).

The rollouts that the next step needs anyway are sampled twice, by the weights before and after the
jump, from the same prompts with the same noise: those of the side that loses are what a test costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from relexkit.extension import Jumper, reward_test
from relexkit.trainer.loop.generation import Generation
from relexkit.trainer.policy.setup import Policy


def try_jump(
    jumper: Jumper,
    step: int,
    most: int,
    sample: Callable[[], Generation],
    policy: Policy,
    say: Callable[[str], None],
) -> tuple[int, Generation | None]:
    """Ask whether to jump from ``step`` by at most ``most`` steps, and do what comes out.

    Args:
        sample: the rollouts of the next step, by the weights as they are.

    Returns the step that the model is at then, and its rollouts where they were sampled. A
    collective call.
    """
    decision = jumper.decide(step, most)
    if not decision.length:
        say(f"step {step}: no jump: {decision.reason}")
        return step, None
    target = step + decision.length
    if not jumper.tested:
        say(f"step {step}: jumps to what {decision.method} predicts for step {target}")
        jumper.jump(decision)
        return jumper.settle(step, decision, None), None
    say(f"step {step}: tries what {decision.method} predicts for step {target}: {decision.reason}")
    before = sample()
    jumper.jump(decision)
    after = sample()
    before_PG, after_PG = (_rewards(sampled, policy) for sampled in (before, after))
    test = reward_test(before_PG, after_PG)
    landed = jumper.settle(step, decision, test, rollouts=before_PG.size)
    if landed == step:
        say(f"step {step}: takes the jump back: {test}; asks again after {jumper.waiting} steps")
        return step, before
    say(f"step {landed}: keeps the jump: {test}")
    return landed, after


def _rewards(generation: Generation, policy: Policy) -> np.ndarray:
    """Rewards ``[P, G]`` of the prompts of all processes."""
    return np.concatenate(policy.processes.gather(generation.reward_PG.numpy()))
