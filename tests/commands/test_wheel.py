"""What a wheel holds, and that its commands work where there is neither a clone nor a tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from runs import write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as an index would have it, without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``relexkit`` of a new environment that has the wheel; its dependencies are those of the
    environment that runs the tests.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # dependencies, but no path that editable installations add: .pth files there are not followed
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = place / "bin" / "relexkit"
    script.write_text(
        f"#!{place / 'bin' / 'python'}\nimport sys\n"
        "from relexkit.__main__ import command\nsys.exit(command())\n"
    )
    script.chmod(0o755)
    return script


def run(command: Path, *given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(command), *given], cwd=folder, env=clean, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_wheel_has_one_import_name_and_real_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 28) == 0o12]
    assert links == []
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"relexkit"}
    for wanted in ("py.typed", "trainer/loop/train.py", "analysis/report.py"):
        assert f"relexkit/{wanted}" in names
    assert "relexkit/trainer/data/sorting/model.safetensors" in names
    for line in ("Author: The relexkit developers", "Classifier: Typing :: Typed"):
        assert line in metadata
    assert re.search(r"^Provides-Extra: notebook$", metadata, re.MULTILINE)


@pytest.mark.slow
def test_the_readmes_commands_work_in_an_empty_folder(command: Path, tmp_path: Path) -> None:
    run_ = write_run(
        tmp_path, motion="drift", density=0.5, steps=range(1, 13), head="tied", extras=False
    )
    (tmp_path / "empty").mkdir()
    given = [
        ["import", str(run_.source), "--base", str(run_.base), "-o", "run.zarr"],
        ["advise", "run.zarr"],
        ["report", "run.zarr", "-o", "report.html"],
        ["extrapolate", "run.zarr", "--to", "500", "1000", "-o", "predicted"],
        ["checkout", "run.zarr", "--step", "4", "-o", "step-4"],
        ["spectrum", "run.zarr", "--scope", "module", "--plot", "figures"],
        ["verify", "run.zarr"],
        ["--help"],
        ["train", "--help"],
    ]
    for words in given:
        result = run(command, *words, folder=tmp_path / "empty")
        assert result.returncode == 0, (words, result.stderr)
    there = {p.name for p in (tmp_path / "empty").iterdir()}
    assert {"run.zarr", "report.html", "predicted", "step-4", "figures"} <= there
    assert (tmp_path / "empty" / "predicted" / "step-1000" / "model.safetensors").is_file()
    python = command.with_name("python")
    asked = "import relexkit; print(relexkit.__file__)"
    place = subprocess.run(
        [str(python), "-c", asked],
        cwd=tmp_path / "empty",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert place.stdout.startswith(str(command.parents[1])), (place.stdout, place.stderr)
