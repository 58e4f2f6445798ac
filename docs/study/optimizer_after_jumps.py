"""What to do with AdamW's state after a jump: three rules on the same run, for docs/jumps.md.

    python docs/study/optimizer_after_jumps.py OUT [--seeds S ...]

Trains the arm relex-25+25-3e-6 of arms.py, with its optimizer treated after every jump as the rule
says. To keep the moments, which is what the trainer does, is that arm itself. Answers are JSON
files as those of study.py, in docs/study/optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Job
from study import RESULTS, Draft, trained

from relexkit.record.jumping import Jumper
from relexkit.trainer.loop import train as program

ARM = "relex-25+25-3e-6"


def fresh(state: dict[str, torch.Tensor]) -> None:
    """As at the start of a run: the next step is as long as the first."""
    for value in state.values():
        value.zero_()


def no_momentum(state: dict[str, torch.Tensor]) -> None:
    """Only the first moment begins anew; the step count stays, so that it grows back slowly."""
    state["exp_avg"].zero_()


def fresh_second(state: dict[str, torch.Tensor]) -> None:
    """The second moment begins anew, scaled as if its average were already long: from the first."""
    state["exp_avg_sq"].copy_(state["exp_avg"].square().clamp_min(1e-16))


RULES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "fresh": fresh,
    "no-momentum": no_momentum,
    "fresh-second": fresh_second,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS.parent / "optimizer")
    asked = parser.parse_args()
    arm = ARMS[ARM]
    optimizers: list[Any] = []
    load, land = program.load_policy, Jumper._land

    def loaded(*args: Any, **options: Any) -> Any:
        policy = load(*args, **options)
        optimizers.append(policy.optimizer)
        return policy

    program.load_policy = loaded
    for seed in asked.seeds:
        for name, rule in RULES.items():

            def landed(self: Any, *args: Any, rule: Any = rule) -> int:
                for state in optimizers[-1].state.values():
                    rule(state)
                return land(self, *args)

            Jumper._land = landed  # type: ignore[method-assign]
            job = Job(0, seed, ARM, "train", 200)
            place = asked.results / name / f"seed-{seed}.json"
            if place.exists():
                continue
            answer = Draft(place, {"rate": arm.rate, "rule": name})
            trained(asked.out / "optimizer" / name / f"seed-{seed}", job, answer)
            answer.keep()
            print(place, flush=True)


if __name__ == "__main__":
    main()
