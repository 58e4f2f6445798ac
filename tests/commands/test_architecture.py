"""The worked examples of docs/architecture.md, run; and the documents that name the tree,
against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import write_run
from strategies import gram_of, trajectory

from relexkit import (
    METHODS,
    Prediction,
    RelexkitError,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
    predict_weights,
    registry,
)
from relexkit.assess.backtest import backtest
from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.formats.table import FORMATS
from relexkit.ingest.readback import ReadBack
from relexkit.registry import Extension
from relexkit.store.encodings.table import ENCODINGS
from relexkit.trainer.credit.loss import AGGREGATIONS, Denominators, aggregate
from relexkit.trainer.tasks import load_task, score

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
EXAMPLES = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
}


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What an example adds is gone after its test."""
    tables: list[dict[str, Any]] = [METHODS, AGGREGATIONS, ENCODINGS]
    kept, formats = [dict(table) for table in tables], list(FORMATS)
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    FORMATS[:] = formats


def example(name: str) -> dict[str, Any]:
    """The names of an example after it has run."""
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[name], name, "exec"), names)
    return names


def test_every_example_is_tested() -> None:
    assert list(EXAMPLES) == [
        "relexkit/predict/halfway.py",
        "relexkit/checkpoints/formats/npz.py",
        "trainer/credit/loss.py",
        "parity.py",
        "mine/__init__.py",
        "mine/hello.py",
        "relexkit/store/encodings/xor.py",
    ]


def test_a_method_is_one_function_and_one_line() -> None:
    example("relexkit/predict/halfway.py")
    steps = np.arange(1, 11)
    gram = gram_of({"w": trajectory("line", steps, 20, seed=1).deltas}, steps)
    weights = predict_weights(gram, [30.0], Prediction(method="halfway"))
    np.testing.assert_array_equal(weights[0, 0], [0] * 9 + [1.5])
    assert "halfway" in backtest(gram, ["halfway"]).methods


def test_a_reader_is_one_module_and_one_line(tmp_path: Path) -> None:
    example("relexkit/checkpoints/formats/npz.py")
    drawn = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for step, array in enumerate(drawn):
        (tmp_path / "run" / f"step_{step}").mkdir(parents=True)
        np.savez(tmp_path / "run" / f"step_{step}" / "weights.npz", w=array)
    store = import_checkpoints(tmp_path / "run", tmp_path / "run.zarr", encoding="exact").store
    assert store.steps.tolist() == [1, 2]
    assert store.attributes["source"].startswith("NumPy archives")
    bits = store.read_state(0, 1, 0, 20)
    np.testing.assert_array_equal(bits.view(np.float32), drawn[2].ravel())


def test_a_loss_is_one_function_and_one_line() -> None:
    example("trainer/credit/loss.py")
    settings: Any = SimpleNamespace(loss_type="longest", max_completion_length=4)
    counts = Denominators(sequences=2, tokens=5, generation_tokens=5)
    losses, mask = torch.full((2, 3), 2.0), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert aggregate(losses, mask, counts, settings).item() == 10 / 8


def test_a_task_is_one_function(tmp_path: Path) -> None:
    (tmp_path / "parity.py").write_text(EXAMPLES["parity.py"])
    task = load_task(f"{tmp_path / 'parity.py'}:make")
    problem = task.problems("validation")[1]
    assert (problem.prompt, score(task, problem, "No.")) == ("Is 101 even?", 1.0)


def test_an_extension_adds_commands_and_plots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from relexkit.cli import commands, main

    (tmp_path / "mine").mkdir()
    for name in ("mine/__init__.py", "mine/hello.py"):
        (tmp_path / name).write_text(EXAMPLES[name])
    monkeypatch.syspath_prepend(tmp_path)
    mine: Extension = example("mine/__init__.py")["EXTENSION"]
    monkeypatch.setattr("relexkit.cli.extensions", lambda: (mine,))
    monkeypatch.setattr(registry, "extensions", lambda: (mine,))
    assert commands()["hello"].help == "say hello to a run"
    assert main(["hello", "run.zarr", "--loudly"]) == 0
    assert capsys.readouterr().out == "HELLO RUN.ZARR\n"
    with pytest.raises(ModuleNotFoundError, match=r"mine\.figures"):
        registry.plot("advise")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_encoding_is_one_module_and_one_line(tmp_path: Path, dtype: str) -> None:
    """All that reads or writes steps takes it, with the results of ``exact``."""
    run = write_run(
        tmp_path, steps=(1, 2, 5), dtype=dtype, density=0.6, motion="drift", buffers=True
    )
    reference = import_checkpoints(
        run.source, tmp_path / "exact.zarr", base=run.base, encoding="exact"
    ).store
    example("relexkit/store/encodings/xor.py")
    place = tmp_path / "xor.zarr"
    asked: dict[str, Any] = {"base": run.base, "encoding": "xor"}
    import_checkpoints(run.source, place, steps=":2", **asked)
    store = import_checkpoints(run.source, place, **asked).store  # compares what is there
    assert {p.encoding for p in store.layout.parts} == {"xor", "fixed"}
    assert (store.attributes["format_version"], store.exact) == (3, True)
    store.verify()
    for part, spec in enumerate(store.layout.parts):
        for row in range(-1, 3):
            states = [s.read_state(part, row, 0, spec.numel) for s in (store, reference)]
            np.testing.assert_array_equal(*states)
        if spec.moves:
            base = store.read_base(part, 0, spec.numel)
            deltas = [s.read_delta(part, 2, 0, spec.numel, base) for s in (store, reference)]
            np.testing.assert_array_equal(*deltas)
    for name in ("matrices", "changed", "moved"):
        np.testing.assert_array_equal(*(getattr(gram(s), name) for s in (store, reference)))
    for name, one in (("xor", store), ("exact", reference)):
        extrapolate(one, [9], tmp_path / name, Prediction(method="two-point"))
        checkout(one, 5, tmp_path / name / "step-5")
    for step in (5, 9):
        first, second = (
            (tmp_path / name / f"step-{step}" / "model.safetensors").read_bytes()
            for name in ("xor", "exact")
        )
        assert first == second
    others = ReadBack(store).difference(2, open_checkpoint(tmp_path / "exact" / "step-5"))
    assert others is None
    del ENCODINGS["xor"]
    with pytest.raises(RelexkitError, match="xor is unknown; choose"):
        import_checkpoints(run.source, tmp_path / "other.zarr", **asked)


# -- the documents and the tree --------------------------------------------------------------------


def test_the_map_in_the_readme_is_the_tree() -> None:
    """Every package and every module at the top of one is in the map, and nothing else."""
    map_ = re.search(
        r"## Where things are\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert map_ is not None
    top, named = "", set()
    for line in map_[1].splitlines():
        if match := re.match(r"(\w+)/  ", line):
            top = match[1]
        elif match := re.match(r"  ([\w/, ]+?)  ", line):
            named |= {f"{top}/{word.strip().rstrip('/')}" for word in match[1].split(",")}
    there = {
        f"{package}/{path.stem}"
        for package in ("relexkit", "trainer")
        for path in (ROOT / package).iterdir()
        if (path.is_dir() and not path.is_symlink() and (path / "__init__.py").exists())
        or (path.suffix == ".py" and not path.name.startswith("__"))
    }
    assert {name for name in named if name.startswith(("relexkit", "trainer"))} == there


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_prose_in_the_documents_is_wrapped() -> None:
    """Tables and code aside, no line is over 160 columns."""
    long = []
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            if not code and not line.startswith("|") and len(line) > 160:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert long == []


def test_files_that_the_documents_name_exist() -> None:
    """``relexkit/...`` and ``tests/...`` in code style, and relative links."""
    missing = []
    for path in documents():
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for name in re.findall(r"`((?:relexkit|trainer|analysis|tests|docs)/[\w./-]+)`", text):
            if not (ROOT / name).exists():
                missing.append(f"{path.relative_to(ROOT)}: {name}")
        for name in re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", text):
            if not (path.parent / name).exists():
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []
