"""The documentation site: Sphinx, with the pages of this folder as they are. ``make docs`` builds
it and takes every warning for an error.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import relexkit
from relexkit.cli import command_parser, commands

project = "relexkit"
author = copyright = "The relexkit developers"
release = version = relexkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"relexkit {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # listings of shell and Python with "..." in them

autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
highlight_language = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

_REFERENCE = Path(__file__).parent / "reference"


def _write_if_new(path: Path, text: str) -> None:
    """Sphinx builds again what is newer than its output."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _commands_page() -> str:
    """Help of every command, from the parsers themselves."""
    parts = ["# Commands\n"]
    for name, command in commands().items():
        parser = command_parser(name, command.load(name))
        parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
        parts.append(f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def _python_page() -> str:
    """Every public name, from its docstring."""
    functions, classes = [], []
    for name in relexkit.__all__:
        value = getattr(relexkit, name)
        if inspect.isclass(value):
            classes.append(f".. autoclass:: relexkit.{name}\n")
        elif inspect.isroutine(value):
            functions.append(f".. autofunction:: relexkit.{name}\n")
    blocks = ["# Python", "## Functions", _rst(functions), "## Values and answers", _rst(classes)]
    return "\n\n".join(blocks) + "\n"


def _rst(lines: list[str]) -> str:
    return "```{eval-rst}\n" + "\n".join(lines) + "```"


def setup(app: Any) -> None:
    """Write the pages of the reference, which git does not keep."""
    _REFERENCE.mkdir(exist_ok=True)
    _write_if_new(_REFERENCE / "commands.md", _commands_page())
    _write_if_new(_REFERENCE / "python.md", _python_page())
