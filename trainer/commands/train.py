"""The ``relexkit train`` command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from relexkit import RelexkitError, Table
from relexkit.extension import print_json, print_pairs
from relexkit.options import Json, option
from relexkit.trainer.commands.configured import configured
from relexkit.trainer.config import GRPOConfig, load_config
from relexkit.trainer.policy.loading import Trust


@dataclass(frozen=True, kw_only=True)
class Options(Json, Trust):
    """Options of ``relexkit train``."""

    config: str | None = option("config", default=None, metavar="CONFIG.yaml")
    """options by name; those given here win"""
    given: dict[str, str] = configured(GRPOConfig)


def answer(options: Options) -> Table | None:
    """Train, or go on with a training that was interrupted: a row for each step of the log. None in
    all processes but the first.
    """
    return _train(options)[1]


def run(options: Options) -> None:
    """Train, and print how it went."""
    config, log = _train(options)
    if log is None:
        return
    folder, last = Path(log.document["output"]), log.document["metrics"]
    rewards = [entry["reward"] for entry in log.rows() if "reward" in entry]  # a jump has none
    if options.json:
        print_json(log.document)
        return
    accuracy = (
        f"{last['eval/accuracy']:.3f} greedy on validation problems"
        if "eval/accuracy" in last
        else "not evaluated"
    )
    following = (
        f"spectrum {folder / 'run.zarr'}" if config.record_every else f"evaluate {folder / 'final'}"
    )
    rows = [
        ("steps", f"{config.max_steps}"),
        ("reward", f"{rewards[0]:.3f} at step 1, {rewards[-1]:.3f} in the last rollouts"),
        ("accuracy", accuracy),
        ("next", f"relexkit {following}"),
    ]
    print_pairs(str(folder), rows)


def _train(options: Options) -> tuple[GRPOConfig, Table | None]:
    if options.config is None and not options.given:
        raise RelexkitError(
            "no configuration was given; expected a YAML file, or --model, --task and --output at"
            " least"
        )
    config = load_config(options.config, options.given)
    from relexkit.trainer.loop.run_log import read_log
    from relexkit.trainer.loop.train import train

    folder = train(config, trust_remote_code=options.trust_remote_code)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one reports
        return config, None
    entries = read_log(folder)
    last = {key: value for key, value in entries[-1].items() if value is not None}
    document = {"output": str(folder), "steps": config.max_steps, "metrics": last}
    return config, Table(document, entries)
