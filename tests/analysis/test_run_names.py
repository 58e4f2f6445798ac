"""Names of compared runs: two stores of the same file name stay two, each with its own values."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from runs import write_run

from relexkit.analysis.report import write_report
from relexkit.analysis.run_names import name_runs
from relexkit.errors import RelexkitError
from relexkit.geometry.spectrum import spectrum
from relexkit.gram_matrix import gram
from relexkit.ingest.importer import import_checkpoints
from relexkit.store import TrajectoryStore


def test_folders_tell_apart_what_file_names_do_not() -> None:
    assert list(name_runs(["/x/a/run.zarr"])) == ["a/run.zarr"]
    assert list(name_runs(["/x/a/mine.zarr"])) == ["mine.zarr"]
    assert list(name_runs(["/x/a/run.zarr", "/x/b/run.zarr"])) == ["a/run.zarr", "b/run.zarr"]
    deep = name_runs(["/x/one/s/run.zarr", "/x/two/s/run.zarr", "/x/two/t/run.zarr"])
    assert list(deep) == ["one/s/run.zarr", "two/s/run.zarr", "t/run.zarr"]
    assert list(deep.values())[1] == "/x/two/s/run.zarr"
    assert list(name_runs(["s3://b/a/x.zarr", "s3://b/c/x.zarr"])) == ["a/x.zarr", "c/x.zarr"]


def test_a_name_of_ones_own_and_a_path_with_an_equals_sign(tmp_path: Path) -> None:
    there = tmp_path / "lr=1.zarr"
    there.mkdir()
    assert name_runs(["big=/x/run.zarr", there]) == {
        "big": "/x/run.zarr",
        "lr=1.zarr": str(there),
    }


@pytest.mark.parametrize(
    ("given", "what"), [(["/x/a", "/x/a/../a"], "run"), (["n=/x/a", "n=/x/b"], "name")]
)
def test_twice_the_same_is_refused(given: list[str], what: str) -> None:
    with pytest.raises(RelexkitError, match=f"the same {what} is given twice"):
        name_runs(given)


def test_two_stores_of_one_name_are_compared_with_their_own_values(tmp_path: Path) -> None:
    paths = []
    for folder, motion in (("line", "drift"), ("other", "bits")):
        run = write_run(
            tmp_path / folder,
            motion=motion,
            density=1.0,
            shapes={"w": (40, 8)},
            steps=tuple(range(1, 9)),
            extras=False,
        )
        path = tmp_path / folder / "run.zarr"
        import_checkpoints(run.source, path, base=run.base)
        paths.append(path)
    page = write_report(paths[0], tmp_path / "report.html", compare=[str(paths[1])]).read_text()
    [table] = re.findall(r'<table class="compared">.*?</table>', page, re.DOTALL)
    table = re.sub(r"</?small>", "", table)
    for path in paths:
        observed = spectrum(gram(TrajectoryStore(path)), scope="global").whole.observed
        assert f"{path.parent.name}/run.zarr" in table
        assert f">{100 * observed['first']:.1f}" in table
    assert len(np.unique(re.findall(r"([\d.]+) %", table))) > 2
