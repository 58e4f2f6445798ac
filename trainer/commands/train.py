"""The ``relexkit train`` command."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from relexkit import RelexkitError, Table
from relexkit.extension import print_json, print_pairs
from relexkit.trainer.commands.trust import add_trust

if TYPE_CHECKING:
    from relexkit.trainer.config import GRPOConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``relexkit train``: a file, then options by the names of
    ``trainer.config.GRPOConfig``.
    """
    from relexkit.trainer.config import GRPOConfig

    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="options by name; those given here win"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_trust(parser)
    add_options(parser, GRPOConfig)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for every field of a configuration, as YAML text: in groups, with type, meaning and
    default beside it.
    """
    from relexkit.trainer.config import option_groups, option_meanings

    parser.allow_abbrev = False
    meanings = option_meanings(kind)
    for heading, fields in option_groups(kind):
        group = parser.add_argument_group(heading)
        for field in fields:
            default = "required" if field.default is dataclasses.MISSING else field.default
            words = f"{meanings[field.name].rstrip('.')} ({_default(default)})"
            group.add_argument(
                f"--{field.name}",
                metavar=_type(str(field.type)),
                default=argparse.SUPPRESS,
                help=words.replace("``", "").replace("%", "%%"),
            )


def _type(annotation: str) -> str:
    """A type as one types its values: ``{a,b}``, ``NUMBER``, ``{true,false}``, ``YAML``."""
    kinds = annotation.removesuffix(" | None")
    if kinds.startswith("Literal["):
        choices = [word.strip().strip("\"'") for word in kinds[8:-1].split(",")]
        return "{" + ",".join(choice for choice in choices if choice) + "}"
    known = {"int": "INTEGER", "float": "NUMBER", "bool": "{true,false}", "str": "TEXT"}
    return known.get(kinds, "YAML")


def _default(value: object) -> str:
    shown = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"default: {shown[value]}"
    return "required" if value == "required" else f"default: {value}"


def given_options(arguments: argparse.Namespace, kind: type) -> dict[str, str]:
    """Those of ``add_options`` that were given."""
    return {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(kind)
        if field.name in arguments
    }


def answer(arguments: argparse.Namespace) -> Table | None:
    """Train, or go on with a training that was interrupted: a row for each step of the log. None in
    all processes but the first.
    """
    return _train(arguments)[1]


def run(arguments: argparse.Namespace) -> None:
    """Train, and print how it went."""
    config, found = _train(arguments)
    if found is None:
        return
    folder, last = Path(found.document["output"]), found.document["metrics"]
    rewards = [entry["reward"] for entry in found.rows() if "reward" in entry]  # a jump has none
    if arguments.json:
        print_json(found.document)
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


def _train(arguments: argparse.Namespace) -> tuple[GRPOConfig, Table | None]:
    from relexkit.trainer.config import GRPOConfig, load_config

    given = given_options(arguments, GRPOConfig)
    if arguments.config is None and not given:
        raise RelexkitError(
            "no configuration was given; expected a YAML file, or --model, --task and --output at"
            " least"
        )
    config = load_config(arguments.config, given)
    from relexkit.trainer.loop.run_log import read_log
    from relexkit.trainer.loop.train import train

    folder = train(config, trust_remote_code=arguments.trust_remote_code)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one reports
        return config, None
    entries = read_log(folder)
    last = {key: value for key, value in entries[-1].items() if value is not None}
    document = {"output": str(folder), "steps": config.max_steps, "metrics": last}
    return config, Table(document, entries)
