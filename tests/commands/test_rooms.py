"""Which room may use which: the imports of every module, lazy ones and those in tables of strings
too, go one way.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "relexkit.errors",
    "relexkit.interrupts",
    "relexkit.version",
    "relexkit.hooks",
    "relexkit.processes",
    "relexkit.options",
    "relexkit.registry",
    "relexkit.results",
    "relexkit.weights",
    "relexkit.store",
    "relexkit.checkpoints",
    "relexkit.gram_matrix",
    "relexkit.geometry",
    "relexkit.ingest",
    "relexkit.predict",
    "relexkit.assess",
    "relexkit.materialize",
    "relexkit.record",
    "relexkit.calls",
    "relexkit",
    "relexkit.commands",
    "relexkit.cli",
    "relexkit.__main__",
    "relexkit.extension",
    "relexkit.analysis",
    "relexkit.trainer",
    "relexkit.trainer.config",
    "relexkit.trainer.tasks",
    "relexkit.trainer.policy",
    "relexkit.trainer.evaluation",
    "relexkit.trainer.credit",
    "relexkit.trainer.loop",
    "relexkit.trainer.experiments",
    "relexkit.trainer.commands",
)
"""Each uses those before it."""

OUTER = ("relexkit.analysis", "relexkit.trainer")
"""Folders of their own beside the package, which reaches them by links."""

SURFACE = {
    "relexkit",
    "relexkit.extension",
    "relexkit.options",
    "relexkit.registry",
    "relexkit.cli",
}
"""What these may import of the rest: ``options`` and ``registry`` load nothing heavy."""


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package by the path of its ``__init__``."""
    found = {}
    for package in ("relexkit", "trainer", "analysis"):
        for path in sorted((ROOT / package).rglob("*.py")):
            words = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(words[:-1] if words[-1] == "__init__" else words)
            found[name if package == "relexkit" else f"relexkit.{name}"] = path
    return found


def imports(source: str, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that a source imports at its top, inside functions, for types, or
    names in a string as a whole, as ``import_module`` and tables of modules do.
    """
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would escape this check"
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # a word alone is a name of many things; a module in a string has a dot
            named |= {m for m in [node.value.partition(":")[0]] if "." in m} & known.keys()
    return {module for name in named if (module := innermost(name, known))}


def innermost(name: str, known: dict[str, Path]) -> str:
    """The longest beginning of a dotted name that is a module, or nothing."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def package_of(module: str) -> str:
    """The outer package of a module, or ``relexkit``."""
    return next((o for o in OUTER if f"{module}.".startswith(f"{o}.")), "relexkit")


def room_of(module: str) -> str:
    """The most specific room; the package ``relexkit`` itself is what it exports."""
    inner = {"relexkit", "relexkit.trainer"} - {module}
    found = [r for r in ROOMS if r not in inner and (module == r or module.startswith(f"{r}."))]
    assert found, f"{module} is in no room: give it one in ROOMS"
    return max(found, key=len)


def test_the_walk_over_imports_sees_what_it_must() -> None:
    known = dict.fromkeys(["a", "a.b", "a.c", "a.d", "a.e", "a.f"], Path())
    source = """
import a.b
from a import c
def later():
    from a.d import run
    return import_module("a.e"), {"plot": "a.f:draw"}, "a.json", "see a.b.name"
"""
    assert imports(source, known) == {"a.b", "a.c", "a.d", "a.e", "a.f"}
    assert imports("import numpy, a.other", known) == {"a"}


def test_rooms_use_those_before_them_and_the_outer_packages_only_the_surface() -> None:
    known = modules()
    assert len(known) > 150
    wrong = []
    for module, path in known.items():
        room = room_of(module)
        for other in imports(path.read_text(), known) - {module}:
            top, other_top = package_of(module), package_of(other)
            if ROOMS.index(room_of(other)) > ROOMS.index(room):
                wrong.append(f"{module} ({room}) imports {other}, a later room")
            elif top != other_top and (other_top != "relexkit" or other not in SURFACE):
                wrong.append(f"{module} imports {other}; expected one of {sorted(SURFACE)}")
    assert wrong == []


def test_there_is_no_circle_of_imports() -> None:
    known = modules()
    uses = {m: imports(path.read_text(), known) - {m} for m, path in known.items()}
    while uses:
        free = {m for m, others in uses.items() if not others & uses.keys()}
        assert free, f"these modules need each other: {sorted(uses)}"
        uses = {m: others for m, others in uses.items() if m not in free}


def test_every_room_exists() -> None:
    known = modules()
    assert {room_of(m) for m in known} == set(ROOMS)


def packages() -> Iterator[ModuleType]:
    for name, path in modules().items():
        if path.name == "__init__.py":
            yield import_module(name)


def test_a_name_that_a_user_imports_is_never_a_module_too() -> None:
    """``relexkit.spectrum`` cannot be a function and a module."""
    known = modules()
    for package in packages():
        inside = {m.rpartition(".")[2] for m in known if m.rpartition(".")[0] == package.__name__}
        shadowed = [n for n in inside if not isinstance(vars(package).get(n, pytest), ModuleType)]
        assert shadowed == [], f"{package.__name__} hides its modules {shadowed}"
