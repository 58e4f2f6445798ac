"""Whether a training should jump: to the weights that its own record predicts for some steps later.

A rule looks at the steps since the last jump, a trajectory of its own
(``relexkit.gram_matrix.segment``), and answers with a ``Decision``. ``FixedJumps`` always jumps
(periodic re-grounding, arXiv 2601.04537). ``Jumps`` jumps only with evidence of a drift above the
noise, and only as far as a method has beaten standing still in these steps themselves; whether the
jump stays is then up to a paired test of the rewards (``reward_test``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from relexkit.assess.backtest import backtest
from relexkit.errors import RelexkitError
from relexkit.geometry.trajectory_model import fit_whole
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.predict.extrapolators import check_request
from relexkit.predict.prediction import Prediction

_CHANCE = 0.05  # p-value of the drift above which there is no evidence of one
_LEAST_DRIFT = 1.0  # of the noise, at the lower end of its interval; below it a line is no gain
_PREFIXES = (0.5, 0.42, 0.35, 0.3)  # of the steps since the last jump, from which it is checked
_FEWEST = 12  # steps to decide from: the shortest prefix has three
_HURT = 0.1  # p-value of a loss of reward at which a jump is taken back


@dataclass(frozen=True)
class Decision:
    """How far to jump, and why.

    Attributes:
        length: steps to jump over; 0 for none.
        method: what predicts the weights there; None for none.
        reason: a sentence without its subject and full stop.
        evidence: what the decision rests on, by name: ``drift_to_noise`` (lower end of its 90 %
            interval), ``p_value`` of the drift, ``skill`` (the smallest of the checks).
    """

    length: int
    method: str | None
    reason: str
    evidence: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class FixedJumps:
    """After ``train_steps`` steps of training, jump to what ``method`` predicts for ``jump_steps``
    later (arXiv 2601.04537), whatever the record says.

    Raises:
        RelexkitError: a number that is too small, or an unknown method.
    """

    train_steps: int
    jump_steps: int
    method: str = "relex"

    tested: ClassVar[bool] = False
    """Whether the rewards decide if a jump stays."""
    remembers: ClassVar[bool] = False
    """Whether a segment after a jump comes with the optimizer's momentum (``momentum_of``); fixed
    jumps start anew, as published.
    """

    def __post_init__(self) -> None:
        if not (isinstance(self.train_steps, int) and self.train_steps >= 3):
            raise RelexkitError(
                f"train_steps {self.train_steps!r} are too few to predict from; expected 3 or more"
            )
        if not (isinstance(self.jump_steps, int) and self.jump_steps >= 1):
            raise RelexkitError(f"jump_steps {self.jump_steps!r} is no jump; expected 1 or more")
        check_request([1.0], Prediction(method=self.method))

    @property
    def every(self) -> int:
        """Trained steps from one decision to the next."""
        return self.train_steps

    @property
    def shortest(self) -> int:
        """Steps of the shortest jump."""
        return self.jump_steps

    def decide(self, segment: Gram, most: int) -> Decision:
        """Jump, whatever the steps in ``segment`` say."""
        return Decision(self.jump_steps, self.method, "as asked for", {})


@dataclass(frozen=True, kw_only=True)
class Jumps:
    """Adaptive jumps: after every ``every`` trained steps, one where the record since the last jump
    speaks for it, of at most as many steps; taken back if the rewards of the next rollouts speak
    against it, and then the next attempt waits twice as long. Where the record does not speak for
    one it is asked again after a quarter of the steps, then half, and so on.

    Args:
        every: trained steps from one decision to the next, at least 12.
        methods: those that may predict, names of ``relexkit extrapolate --method``.

    Raises:
        RelexkitError: too few steps, no method, or an unknown one.
    """

    every: int = 25
    methods: tuple[str, ...] = ("drift", "relex", "two-point")

    tested: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.every, int) and self.every >= _FEWEST):
            raise RelexkitError(
                f"every {self.every!r} steps are too few to decide from; expected {_FEWEST} or more"
            )
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise RelexkitError("methods: lacks a method; expected one or more, such as drift")
        for method in self.methods:
            check_request([1.0], Prediction(method=method))

    @property
    def shortest(self) -> int:
        """Steps of the shortest jump."""
        return self.every // 4

    def decide(self, segment: Gram, most: int) -> Decision:
        """How far to jump from the end of ``segment``, at most ``most`` steps.

        The longest of ``every`` steps, half and a quarter of them at which one of the methods beat
        standing still from each of four prefixes of the segment, at the same ratio of target to
        last step, never more than 2, nor farther than the drift may keep its direction; of several
        methods the one whose smallest skill is largest.

        Args:
            segment: steps since the last jump (``segment_gram``), which count from it; after a
                jump with the optimizer's momentum (``momentum_of``).
            most: steps that are left.

        Reads no weights; about a second.
        """
        trained = len(segment.steps)
        if trained < _FEWEST or not np.trace(segment.matrices.sum(axis=0)) > 0:
            return Decision(0, None, f"{trained} steps are too few to decide from", {})
        with single_threaded_blas():
            fit = fit_whole(segment)
        if fit is None:
            return Decision(0, None, "these steps cannot be fitted", {})
        low, high = fit.drift_to_noise_interval
        evidence = {"drift_to_noise": low, "p_value": fit.p_value}
        if fit.p_value > _CHANCE:
            found = f"no evidence of a drift in {trained} steps (p = {fit.p_value:.2g})"
            return Decision(0, None, found, evidence)
        drift = f"the drift of {trained} steps stands {low:.2g} to {high:.2g} times above the noise"
        if low <= _LEAST_DRIFT:
            return Decision(0, None, f"{drift}, not certainly above it", evidence)
        lasting = fit.correlation_time_interval[1]
        if lasting < self.shortest:
            turning = f"{drift}, but it turns within {lasting:.2g} steps"
            return Decision(0, None, turning, evidence)
        with single_threaded_blas():
            for length, skills in self._checked(segment, min(most, lasting)):
                method = max(skills, key=lambda m: skills[m], default=None)
                if method is not None and skills[method] > 0:
                    why = (
                        f"{drift}, and {method} beat standing still by {100 * skills[method]:.0f} %"
                        f" of the squared error or more in {len(_PREFIXES)} checks of these steps"
                    )
                    return Decision(length, method, why, evidence | {"skill": skills[method]})
        return Decision(0, None, f"{drift}, but no method always beat standing still", evidence)

    def _checked(self, segment: Gram, most: float) -> Iterator[tuple[int, dict[str, float]]]:
        """Every length, longest first, and the smallest skill of every method at it."""
        trained = len(segment.steps)
        last = float(segment.steps[-1])
        counts = sorted({max(3, round(share * trained)) for share in _PREFIXES})
        result = backtest(
            segment, self.methods, prefixes=[int(segment.steps[c - 1]) for c in counts]
        )
        for length in (self.every, self.every // 2, self.shortest):
            ratio = (last + length) / last
            if length > most or ratio > 2:
                continue
            smallest = {}
            for method in self.methods:
                skill_PT = result.skill(method)
                found = [
                    skill_PT[row, _nearest(segment.steps, ratio * segment.steps[count - 1])]
                    for row, count in enumerate(result.prefixes)
                ]
                if np.isfinite(found).all():
                    smallest[method] = float(min(found))
            yield length, smallest


JumpRule = FixedJumps | Jumps


def momentum_of(first: Gram) -> float | None:
    """The optimizer's momentum from the steps before the first jump, as ``Gram.momentum`` of the
    segments after it; None if it cannot be fitted.

    A jump leaves the optimizer as it is. Where it started with the run its momentum shows in the
    first steps; in 25 steps after a jump alone momentum and a drift look alike.
    """
    with single_threaded_blas():
        fit = fit_whole(first)
    return None if fit is None else fit.momentum


def _nearest(steps: np.ndarray, target: float) -> int:
    return int(np.abs(steps - target).argmin())


@dataclass(frozen=True)
class RewardTest:
    """What a jump did to the rewards of the same prompts with the same random numbers.

    Attributes:
        before, after: mean reward of the weights before and after the jump.
        p_hurt: chance of a loss at least as large, if the jump did not hurt: one-sided paired t
            test over prompts.
    """

    before: float
    after: float
    p_hurt: float

    @property
    def kept(self) -> bool:
        """False if the jump hurt."""
        return self.p_hurt > _HURT

    @property
    def numbers(self) -> dict[str, float]:
        """By name."""
        return {"before": self.before, "after": self.after, "p_hurt": self.p_hurt}

    def __str__(self) -> str:
        return (
            f"reward {self.before:.3f} before and {self.after:.3f} after it on the same prompts"
            f" (chance of such a loss {self.p_hurt:.2g})"
        )


def reward_test(before_PG: np.ndarray, after_PG: np.ndarray) -> RewardTest:
    """Compare the rewards ``[P, G]`` of G rollouts of P prompts, two or more, before and after a
    jump.
    """
    from scipy.stats import t as student  # a command that needs none of it starts without

    before_P, after_P = (
        np.asarray(rewards, np.float64).mean(axis=1) for rewards in (before_PG, after_PG)
    )
    gain_P = after_P - before_P
    error = float(gain_P.std(ddof=1)) / math.sqrt(len(gain_P))
    gain = float(gain_P.mean())
    p_hurt = float(student.cdf(gain / error, len(gain_P) - 1)) if error else float(gain >= 0)
    return RewardTest(float(before_P.mean()), float(after_P.mean()), p_hurt)
