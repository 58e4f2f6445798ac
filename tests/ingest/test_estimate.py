"""The estimate of an import against the import."""

import json
from pathlib import Path

import pytest
from runs import write_run

from relexkit import CheckpointError, import_checkpoints
from relexkit.cli import main
from relexkit.ingest.estimate import estimate_import
from relexkit.ingest.reading import Reading

SHAPES = {
    "model.embed_tokens.weight": (700, 400),
    "model.layers.0.mlp.up_proj.weight": (300, 400),
    "model.norm.weight": (400,),
}


@pytest.mark.parametrize(
    ("dtype", "motion", "density", "encoding", "expected"),
    [
        ("bfloat16", "bits", 0.02, "auto", ["sparse"]),
        ("float32", "drift", 1.0, "auto", ["float"]),
        ("float32", "drift", 1.0, "exact", ["exact"]),
    ],
)
def test_the_size_is_that_of_the_store_that_an_import_writes(
    dtype: str, motion: str, density: float, encoding: str, expected: list[str], tmp_path: Path
) -> None:
    options = {
        "dtype": dtype,
        "motion": motion,
        "density": density,
        "shapes": SHAPES,
        "extras": False,
    }
    run = write_run(tmp_path, steps=range(1, 9), **options)
    found = estimate_import(run.source, reading=Reading(base=run.base, encoding=encoding))
    assert not list(tmp_path.glob("*.zarr*"))
    assert (found.steps, found.encodings, found.dtypes) == (list(range(1, 9)), expected, [dtype])
    assert (found.num_tensors, found.num_parameters) == (3, 400_400)
    assert found.sampled == pytest.approx((2 * 2**16 + 400) / 400_400)
    assert found.checkpoint_bytes == 8 * 400_400 * (2 if dtype == "bfloat16" else 4)
    assert found.seconds > 0
    sizes = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding=encoding
    ).store.num_bytes()
    # a slice of the same random changes; descriptions (zarr.json) and the index are not scaled down
    # with it
    assert found.step_bytes == pytest.approx(
        sizes.get("updates", 0) + sizes.get("deltas", 0), rel=0.15
    )
    assert found.base_bytes == pytest.approx(sizes["base"], rel=0.15)


def test_factors_are_estimated_as_they_are(tmp_path: Path) -> None:
    from test_peft import VARIANTS, llama

    made = llama(tmp_path, **VARIANTS["plain"])
    found = estimate_import(made.source, reading=Reading(base=made.base))
    store = import_checkpoints(made.source, tmp_path / "s.zarr", base=made.base).store
    assert (found.encodings, found.seconds) == (["factors"], None)
    assert found.step_bytes == 5 * 4 * sum(
        part.factors.numel for part in store.layout.parts if part.factors
    )


def test_a_single_step_and_buffers_are_estimated_too(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[4], buffers=True)
    assert estimate_import(run.source, reading=Reading(base=run.base)).steps == [4]


def test_what_an_import_would_refuse_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(
        CheckpointError,
        match="has no step 0, so the base is unknown; give the base model with --base DIR",
    ):
        estimate_import(run.source)
    with pytest.raises(
        CheckpointError,
        match="hf://lab/run: --dry-run reads from a sample of the weights; expected folders",
    ):
        estimate_import("hf://lab/run", reading=Reading(base=run.base))


def test_the_command_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    command = [
        "import",
        str(run.source),
        "--base",
        str(run.base),
        "-o",
        str(tmp_path / "s.zarr"),
        "--dry-run",
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == run.steps
    assert main(command) == 0
    assert "a sample of 100 % of the weights; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "s.zarr").exists()
