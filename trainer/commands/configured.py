"""Options of a command by the names of a configuration, each as YAML text."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

from relexkit.options import custom
from relexkit.trainer.config import option_groups, option_meanings


def configured(kind: type) -> Any:
    """A field that holds those fields of the configuration ``kind`` that were given as options, by
    name, as YAML text.
    """
    return custom(partial(add_options, kind=kind), partial(given_options, kind=kind))


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for every field of a configuration, as YAML text: in groups, with type, meaning and
    default beside it.
    """
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
    """The options of ``add_options`` that were given."""
    return {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(kind)
        if field.name in arguments
    }
