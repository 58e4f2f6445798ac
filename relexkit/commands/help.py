"""Help, spelling and completion of the command line: one parser that forgives and explains.

Options are shown with dashes and taken with underscores too; what is nearly an option or a command
is answered with what may be meant; the help ends with examples and the meanings of its choices.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from relexkit.registry import Command

_SAME = {"--output": "--out", "--out": "--output", "--steps": "--step", "--targets": "--to"}
"""Other spellings of an option, taken where it has this one."""

_LONGEST = 40  # letters of choices beside their option


class Parser(argparse.ArgumentParser):
    """A parser of one command's options."""

    def __init__(self, name: str, command: Command):
        self.examples = command.examples
        super().__init__(
            prog=f"relexkit {name}",
            description=command.help[0].upper() + command.help[1:] + ".",
            allow_abbrev=True,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, other spellings of known options understood."""
        return super().parse_known_args([self._spelled(word) for word in args], namespace)

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        dashed = name.replace("_", "-")
        for other in (dashed, _SAME.get(dashed, dashed)):
            if other in self._option_string_actions:
                return other + equals + value
        return word

    def error(self, message: str) -> NoReturn:
        """Says what may have been meant."""
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown and message.startswith("unrecognized"):
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message += meant(unknown[0].partition("=")[0], known)
        super().error(f"{message}\n{self.prog} --help shows all options")

    def one_spelling(self) -> None:
        """Shows every option with dashes, and choices that fill a line as words of its help."""
        for action in self._actions:
            action.option_strings = [
                "--" + name[2:].replace("_", "-") if name.startswith("--") else name
                for name in action.option_strings
            ]
            for name in action.option_strings:
                self._option_string_actions[name] = action
            choices = str(action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}")
            if choices.startswith("{") and len(choices) > _LONGEST:
                action.metavar = "WORD"
                action.help = f"{choices[1:-1].replace(',', ', ')}: {action.help}"

    def format_usage(self) -> str:
        """What must be given, and that there are options."""
        needed = [self.prog]
        for action in sorted(self._actions, key=lambda action: bool(action.option_strings)):
            many = " ..." if action.nargs in ("+", "*") else ""
            if not action.option_strings:
                word = f"{action.metavar or action.dest}{many}"
                needed.append(f"[{word}]" if action.nargs in ("?", "*") else word)
            elif action.required:
                needed.append(f"{action.option_strings[0]} {action.metavar or 'WORD'}{many}")
        return f"usage: {' '.join([*needed, '[options]'])}\n"

    def format_help(self) -> str:
        """Usage, options by group, meanings of choices, examples."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        parts = [self.format_usage(), formatter.format_help()]
        dests = {action.dest for action in self._actions}
        if "method" in dests:
            from relexkit.predict.extrapolators import METHODS

            parts.append(_listed("methods", {name: m.about for name, m in METHODS.items()}))
        if "scope" in dests:
            from relexkit.weights.layout import SCOPE_MEANINGS

            parts.append(_listed("scopes", dict(SCOPE_MEANINGS.items())))
        if self.examples:
            lines = "".join(f"  relexkit {self.prog.split()[1]} {e}\n" for e in self.examples)
            parts.append(f"examples:\n{lines}")
        return "\n".join(parts)


def overview(commands: Mapping[str, Command]) -> str:
    """The commands by what they are for."""
    groups: dict[str, dict[str, str]] = {}
    for name, command in commands.items():
        groups.setdefault(command.group, {})[name] = command.help
    intro = "Trajectory stores, spectra and extrapolated checkpoints of RL runs of language models."
    parts = ["usage: relexkit COMMAND [options]\n", textwrap.fill(intro, _width()) + "\n"]
    rest = groups.pop(Command.group, {})
    groups["other"] = rest
    parts += [_listed(group, listed) for group, listed in groups.items() if listed]
    parts.append(
        "examples:\n  relexkit demo\n  relexkit import checkpoints/ -o run.zarr\n"
        "  relexkit advise run.zarr\n  relexkit report run.zarr -o report.html\n"
    )
    parts.append("relexkit COMMAND --help shows the options of a command, --version the version.\n")
    return "\n".join(parts)


def meant(word: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` if something known is near, else nothing."""
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _listed(title: str, meanings: Mapping[str, str]) -> str:
    column = max(map(len, meanings)) + 4
    return f"{title}:\n" + "".join(
        textwrap.fill(
            meaning,
            _width(),
            initial_indent=f"  {name:<{column - 2}}",
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
        + "\n"
        for name, meaning in meanings.items()
    )


def _width() -> int:
    return min(100, max(40, shutil.get_terminal_size().columns - 2))
