"""The rollouts of a TRL ``GRPOTrainer``, sampled twice with the same random numbers where a jump is
tested.

TRL has no public place between an optimizer step and the rollouts of the next one. Two methods of
the trainer are wrapped, under names that it has had since 0.16: ``_generate_and_score_completions``
and ``_calculate_rewards``, whose rewards are those of all processes.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from relexkit.errors import RelexkitError

Sampled = tuple[Any, "_Course"]
"""Rollouts, and where the trainer is after them."""
Sample = Callable[[], tuple[Sampled, np.ndarray]]
_GENERATE, _SCORE = "_generate_and_score_completions", "_calculate_rewards"
_LOGGED = ("_metrics", "_logs")


class Rollouts:
    """Stands between a trainer and its rollouts.

    Args:
        trainer: a ``trl.GRPOTrainer``.
        attempt: asked before the rollouts that begin an optimizer step, with what samples them and
            their rewards ``[P, G]``; the rollouts to train on, or None to sample them as ever.

    Raises:
        RelexkitError: the trainer has no such rollouts, or an engine of its own samples them.
    """

    def __init__(self, trainer: Any, attempt: Callable[[Sample], Sampled | None]):
        if not all(hasattr(trainer, name) for name in (_GENERATE, _SCORE)):
            raise RelexkitError(
                f"jumps: {type(trainer).__name__} has no rollouts to test a jump with; expected a"
                " GRPOTrainer of TRL, or FixedJumps, which are not tested"
            )
        if getattr(trainer, "use_vllm", False):
            raise RelexkitError(
                "jumps: vLLM would sample with the weights before the jump; expected use_vllm=False"
            )
        self._trainer, self._attempt = trainer, attempt
        self._generate, self._score = getattr(trainer, _GENERATE), getattr(trainer, _SCORE)
        self._rewards_PG = np.empty((0, 0))
        self.between_steps = False
        """Whether the next rollouts begin an optimizer step."""
        setattr(trainer, _GENERATE, self._sampled)
        setattr(trainer, _SCORE, self._scored)

    def release(self) -> None:
        """Give the trainer its own methods back."""
        for name in (_GENERATE, _SCORE):
            self._trainer.__dict__.pop(name, None)

    def _scored(self, *args: Any, **options: Any) -> Any:
        rewards_NF = self._score(*args, **options)
        weighted_NF = rewards_NF * self._trainer.reward_weights.to(rewards_NF.device)[None]
        group = self._trainer.num_generations
        self._rewards_PG = weighted_NF.nansum(dim=1).view(-1, group).float().cpu().numpy()
        return rewards_NF

    def _sampled(self, inputs: list[dict[str, Any]]) -> Any:
        begins, self.between_steps = self.between_steps, False
        if not (begins and self._trainer.model.training):
            return self._generate(inputs)
        start = _Course(self._trainer)

        def sample() -> tuple[Sampled, np.ndarray]:
            start.resume()
            found = self._generate([dict(row) for row in inputs])
            return (found, _Course(self._trainer)), self._rewards_PG

        chosen = self._attempt(sample)
        if chosen is None:
            return self._generate(inputs)
        found, course = chosen
        course.resume()
        return found


class _Course:
    """Where a trainer's random numbers and logs are, to go on from there again."""

    def __init__(self, trainer: Any):
        import torch

        self._trainer = trainer
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        # the global generators, because reward functions may draw from them
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self._logged = self._copies(trainer.__dict__)

    def resume(self) -> None:
        """Go on from here."""
        import torch

        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        self._trainer.__dict__.update(self._copies(self._logged))

    @staticmethod
    def _copies(values: dict[str, Any]) -> dict[str, Any]:
        return {name: copy.deepcopy(values[name]) for name in _LOGGED if name in values}
