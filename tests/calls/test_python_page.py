"""The page on Python does what it says: its blocks run in order, on recorded runs."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
from runs import Run
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
_SIX = (
    "All update cosines",
    "Each layer's first direction as a vector",
    "Projection of a checkpoint",
    "Two runs' directions compared",
    "A tensor's delta at a step",
    "An extrapolator of your own, in a loaded model",
)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_block_runs(
    two_runs: tuple[Run, Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, folder = two_runs
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    Path("run.zarr").symlink_to(folder / "a.zarr")
    Path("other.zarr").symlink_to(folder / "b.zarr")
    Path("checkpoint").symlink_to(second.folders[12])
    model = AutoModelForCausalLM.from_pretrained(first.base)
    scope = {"model": model}
    for block in blocks(PAGE.read_text()):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert Path("predicted/step-24/model.safetensors").is_file()
    assert "<html" in Path("report.html").read_text()
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.parametrize("heading", _SIX)
def test_each_of_the_six_takes_at_most_five_lines(heading: str) -> None:
    section = PAGE.read_text().split(f"### {heading}\n")[1].split("\n##")[0]
    lines = [line for block in blocks(section)[-1:] for line in block.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 5
