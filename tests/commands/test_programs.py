"""The programs beside the package (studies, benchmarks) find what they import."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    path.relative_to(ROOT)
    for folder in ("docs", "tests/benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_build" not in path.parts
]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_program_finds_what_it_imports(program: Path) -> None:
    lacking = []
    for node in ast.walk(ast.parse((ROOT / program).read_text())):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module is None or module.split(".")[0] != "relexkit":
            continue
        found = import_module(module)
        lacking += [f"{module}.{alias.name}" for alias in node.names if not _has(found, alias.name)]
    assert not lacking


def _has(module: object, name: str) -> bool:
    if hasattr(module, name):
        return True
    try:
        import_module(f"{module.__name__}.{name}")  # type: ignore[attr-defined]
    except ImportError:
        return False
    return True
