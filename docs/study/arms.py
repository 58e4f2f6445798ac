"""The arms of the study: what is trained, at what length, with which seeds, and what is asked of
each run, the most decisive first.

A job is one arm with one seed and one question. Its answer is one JSON file, so any machine can add
some of them, in any order, at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from second_task import SPELLING
from second_task import make as make_spelling_model
from smollm2 import SUMS
from smollm2 import make as make_smollm2

from relexkit.trainer.policy.small_model import FOLDER

RANDOM_REWARDS = {"name": f"{Path(__file__).with_name('random_rewards.py')}:make"}
GROUP = 8

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
CUTS = (50, 25, 100, 150)
"""Steps from which the rest of a run is predicted."""
RATIOS = (1.25, 1.5, 2.0, 4.0, 10.0)
METHODS = ("relex", "two-point", "least-squares", "drift", "model")
"""Methods whose prediction depends on the target; hold and average are asked once a cut."""


def _packaged(out: Path) -> Path:
    return FOLDER


def _spelling_model(out: Path) -> Path:
    return _made(out / "spelling-model", make_spelling_model)


def _smollm2_model(out: Path) -> Path:
    return _made(out / "smollm2", make_smollm2)


def _made(place: Path, make: Callable[[Path], None]) -> Path:
    if not place.exists():
        make(place)
    return place


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on a task, and how finely it is asked.

    Attributes:
        prefix: with which the names of its arms begin.
        model: its folder, made below the study's own folder if need be.
        task: what is trained and evaluated.
        problems: held-out problems of an evaluation.
        every: steps between two evaluations and two saved states of a run.
        ratios, methods: targets of a prediction, as multiples of its last step, and its methods.
        micro_batch_tokens, generation_rows: what the memory allows.
        preferences: ``(steps, options)`` of G2D, by names of ``trainer.config.G2DConfig``.
    """

    prefix: str = ""
    model: Callable[[Path], Path]
    task: Mapping[str, Any]
    problems: int = 512
    every: int = 25
    ratios: tuple[float, ...] = RATIOS
    methods: tuple[str, ...] = METHODS
    micro_batch_tokens: int = 4096
    generation_rows: int = 256
    preferences: tuple[tuple[int, ...], Mapping[str, Any]] = (
        (25, 50, 100, 150),
        {"learning_rate": 3e-5, "beta": 0.5},
    )


SORTING = Subject(model=_packaged, task={"name": "arithmetic", "family": "sorting"})
SPELLING_WORDS = Subject(prefix="spelling-", model=_spelling_model, task=SPELLING)
SMOLLM2 = Subject(
    prefix="smollm2-",
    model=_smollm2_model,
    task=SUMS,
    problems=128,
    every=15,
    ratios=(1.5,),
    methods=("relex", "drift"),
    micro_batch_tokens=2048,
    generation_rows=64,
    preferences=((30,), {"learning_rate": 1e-5, "beta": 0.1}),
)

_FIVE, _TWO = tuple(range(5)), (0, 1)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folder and in the tables.
        rate, prompts: learning rate, and prompts of a step, of eight rollouts each.
        subject: what is trained and evaluated.
        control: whether it is plain training but for the size of its batches or its warm-up.
        jump: method, trained steps and jumped steps of fixed jumps; None for none.
        options: what else differs from plain GRPO, by names of ``trainer.config.GRPOConfig``.
        lengths: ``(priority, steps)``: a run is first trained to the step of least priority number,
            and later goes on. Steps that are jumped over count.
        seeds: how many matter how much: ``(seeds, added priority)``.
        cuts: steps from which its future is predicted.
        further: other questions, of ``g2d`` and ``precision``.
    """

    name: str
    rate: float
    prompts: int = 32
    subject: Subject = SORTING
    control: bool = False
    jump: tuple[str, int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...] = _TWO
    cuts: tuple[int, ...] = ()
    further: tuple[str, ...] = ()

    @property
    def jumps(self) -> bool:
        """Whether it jumps inside the training."""
        return self.jump is not None or "jumps" in self.options

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the training that are the arm's own."""
        own: dict[str, Any] = {
            "task": self.subject.task,
            "learning_rate": self.rate,
            "generation_batch_size": GROUP * self.prompts,
            **self.options,
        }
        if self.jump is not None:
            method, trained, jumped = self.jump
            own["regrounding"] = {
                "train_steps": trained,
                "jump_steps": jumped,
                "method": method,
            }
        return own


@dataclass(frozen=True, order=True)
class Job:
    """One question to one run: ``train`` to ``steps``, ``predict`` from ``steps``, ``g2d`` or
    ``precision``.

    Jobs are ordered by priority, then seed.
    """

    priority: int
    seed: int
    arm: str
    question: str
    steps: int

    @property
    def result(self) -> Path:
        """Where its answer stands below the folder of the results."""
        ending = {
            "train": "",
            "predict": f"-from-{self.steps}",
            "g2d": "-g2d",
            "precision": "-precision",
        }[self.question]
        return Path(self.arm) / f"seed-{self.seed}{ending}.json"


def rate_name(rate: float) -> str:
    """``3e-6`` for 3e-06."""
    return f"{rate:.0e}".replace("e-0", "e-")


def _plain() -> Iterable[Arm]:
    """Constant rates at 256 rollouts a step: the runs that everything is held against."""
    first = {1e-6: 5, 3e-6: 0, 1e-5: 0, 3e-5: 1, 1e-4: 1, 3e-4: 3}
    for rate in RATES:
        decides = rate not in (1e-6, 3e-4)
        yield Arm(
            name=f"plain-{rate_name(rate)}",
            rate=rate,
            lengths=((first[rate], 150 if rate < 3e-5 else 75), (first[rate] + 4, 300)),
            seeds=_FIVE if decides else _TWO,
            cuts=CUTS,
            further=("g2d", "precision") if rate in (3e-6, 1e-5, 1e-4) else (),
        )


def _jumping() -> Iterable[Arm]:
    """Fixed jumps inside the training."""
    for rate in RATES[1:5]:
        for method in ("drift", "relex", "two-point"):
            for trained, jumped in ((25, 25), (25, 12), (25, 50), (10, 10)):
                usual, decides = (trained, jumped) == (25, 25), method != "two-point"
                steps = 100 // trained * (trained + jumped)
                early = 0 if rate < 1e-5 and usual else 2 if rate < 3e-5 and usual else 4
                yield Arm(
                    name=f"{method}-{trained}+{jumped}-{rate_name(rate)}",
                    rate=rate,
                    jump=(method, trained, jumped),
                    lengths=(
                        (
                            early + 2 * (not decides) + 2 * (not usual),
                            steps,
                        ),
                    ),
                    seeds=_FIVE if usual and decides and rate < 3e-5 else _TWO,
                )


def _adaptive() -> Iterable[Arm]:
    """Jumps that ask the record, and are kept or taken back by rewards."""
    for rate in RATES[:5]:
        yield Arm(
            name=f"adaptive-{rate_name(rate)}",
            rate=rate,
            options={"jumps": "adaptive"},
            lengths=((0, 200), (5, 360)) if rate < 3e-5 else ((1, 75),),
            seeds=_TWO if rate == 1e-6 else _FIVE,
        )


def _spelling() -> Iterable[Arm]:
    """The second task: plain training, adaptive and fixed jumps at two rates, and a large rate."""
    for rate in (3e-6, 1e-5, 1e-4):
        settings: dict[str, Any] = {"rate": rate, "subject": SPELLING_WORDS}
        steps = 150 if rate < 1e-4 else 75
        name = rate_name(rate)
        yield Arm(name=f"spelling-plain-{name}", lengths=((1, steps),), **settings)
        if rate < 1e-4:
            adaptive = {"jumps": "adaptive"}
            relex = ("relex", 25, 25)
            yield Arm(
                name=f"spelling-adaptive-{name}", options=adaptive, lengths=((1, 200),), **settings
            )
            yield Arm(
                name=f"spelling-relex-25+25-{name}", jump=relex, lengths=((4, 200),), **settings
            )


def _noise_scale() -> Iterable[Arm]:
    """Half and four times the prompts of a step."""
    for prompts in (16, 128):
        for rate in (3e-6, 1e-5, 1e-4):
            yield Arm(
                name=f"plain-{rate_name(rate)}-{prompts}-prompts",
                rate=rate,
                prompts=prompts,
                control=True,
                lengths=((6, 100), (9, 300)),
                cuts=(50,),
            )


def _systems() -> Iterable[Arm]:
    """What else is done to GRPO, and weights without float32 masters."""
    kinds: dict[str, dict[str, Any]] = {
        "delta": {"token_weighting": "delta"},
        "delta-decay": {"token_weighting": "delta", "weight_decay": 0.1},
        "decay": {"weight_decay": 0.1},
        "lampo": {"advantage": "lampo"},
        "kl": {"beta": 0.001},
        "random-rewards": {"task": RANDOM_REWARDS},
        "bfloat16-nearest": {"precision": "bfloat16_nearest"},
        "bfloat16-stochastic": {"precision": "bfloat16_stochastic"},
    }
    asked = ("kl", "random-rewards", "bfloat16-nearest", "bfloat16-stochastic")
    for rate in (3e-6, 1e-5, 1e-4):
        for name, options in kinds.items():
            yield Arm(
                name=f"{name}-{rate_name(rate)}",
                rate=rate,
                options=options,
                lengths=((5, 100), (9, 300)),
                cuts=(50,) if name in asked else (),
            )


def _smollm2() -> Iterable[Arm]:
    """A real model, as far as two cores go: plain, jumps, LamPO, a larger rate."""
    settings: dict[str, Any] = {"subject": SMOLLM2, "prompts": 8}
    for rate, steps in ((5e-6, 60), (3e-5, 30)):
        usual = rate == 5e-6
        yield Arm(
            name=f"smollm2-plain-{rate_name(rate)}",
            rate=rate,
            lengths=((2, steps),),
            cuts=(30,) if usual else (),
            further=("g2d",) if usual else (),
            **settings,
        )
    for method in ("relex", "drift"):
        yield Arm(
            name=f"smollm2-{method}-15+15-5e-6",
            rate=5e-6,
            jump=(method, 15, 15),
            lengths=((3, 60),),
            **settings,
        )
    yield Arm(
        name="smollm2-lampo-5e-6",
        rate=5e-6,
        options={"advantage": "lampo"},
        lengths=((4, 30),),
        **settings,
    )


def _warm_up() -> Iterable[Arm]:
    """The other control: a warm-up to the rate of a plain arm, which then stays."""
    for rate in (3e-5, 1e-4, 3e-4):
        yield Arm(
            name=f"warm-up-{rate_name(rate)}",
            rate=rate,
            control=True,
            options={"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20},
            lengths=((4, 150),),
            cuts=(50,),
        )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arms in (
        _plain(),
        _jumping(),
        _adaptive(),
        _spelling(),
        _noise_scale(),
        _systems(),
        _warm_up(),
        _smollm2(),
    )
    for arm in arms
}


def plain_arms(subject: Subject) -> dict[float, Arm]:
    """Plain training of a subject with the usual prompts, by rate."""
    names = {rate: f"{subject.prefix}plain-{rate_name(rate)}" for rate in (*RATES, 5e-6)}
    return {rate: ARMS[names[rate]] for rate in sorted(names) if names[rate] in ARMS}


def jobs() -> list[Job]:
    """Everything there is to do, in the order in which to do it.

    The second seed of an arm comes one priority after the first, later ones three. A prediction
    comes one priority after the training that it needs, its later cuts after that; G2D and
    precision last.
    """
    found = []
    for arm in ARMS.values():
        for seed in arm.seeds:
            late = seed if seed in _TWO else 3
            found += [
                Job(priority + late, seed, arm.name, "train", steps)
                for priority, steps in arm.lengths
            ]
            for place, cut in enumerate(arm.cuts):
                needed = next(p for p, steps in sorted(arm.lengths) if steps > cut)
                found.append(Job(needed + late + 1 + place, seed, arm.name, "predict", cut))
            last = max(priority for priority, _ in arm.lengths)
            found += [Job(last + late + 1, seed, arm.name, question, 0) for question in arm.further]
    return sorted(found)
