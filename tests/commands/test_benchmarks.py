"""The benchmark program runs to its end on a tiny run and reports every part; how long anything
took is not looked at.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "run.py"
TINY = "--parameters 3e4 --steps 4 --layers 1 --repeats 1 --memory-parameters 3e4 --memory-steps 3"


def run_program(folder: Path, words: str) -> tuple[dict[str, Any], str]:
    """The numbers and the printed tables; ``folder`` must be left with nothing else inside."""
    out = folder / "numbers.json"
    command = [
        sys.executable,
        str(PROGRAM),
        *TINY.split(),
        *words.split(),
        "--work",
        str(folder),
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.iterdir()) == [out], "temporary files stay behind"
    return json.loads(out.read_text()), done.stdout


def check_pipeline(pipeline: dict[str, Any]) -> None:
    stages = pipeline["relexkit"][0]
    parts = [stages[name] for name in ("import", "Gram", "extrapolate")]
    assert stages["all"]["peak_bytes"] == max(p["peak_bytes"] for p in parts)
    # An interpreter with numpy inside takes more than 10 MB: the peak is that of the command, in
    # bytes.
    assert 1e7 < stages["all"]["peak_bytes"] < 2e9
    assert stages["import"]["left_bytes"] > pipeline["disk"]["steps"] > 0


def check_agreement(agreement: dict[str, Any]) -> None:
    assert len(agreement) == 2
    # The oracle is in float64; the float32 output resolves weights of 0.1 to 4e-9, updates are
    # about 1e-6.
    assert all(0 < pair["worst"] < 1e-2 for pair in agreement.values())


def test_pipeline_and_agreement_run_on_a_tiny_synthetic_run(tmp_path: Path) -> None:
    numbers, printed = run_program(tmp_path, "--sources bfloat16 --only pipeline agreement")
    check_pipeline(numbers["pipeline"]["bfloat16"])
    check_agreement(numbers["agreement"])
    assert numbers["pipeline"]["bfloat16"]["disk"]["exact"]
    assert "relexkit: extrapolate" in printed
    assert "over `cp -r`" in printed.partition("Budgets")[2]


def test_a_budget_is_met_by_the_median_or_by_the_largest() -> None:
    """Worked out by hand; the module is of the benchmarks, which are programs."""
    spec = importlib.util.spec_from_file_location("budgets", PROGRAM.with_name("budgets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["budgets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)

    def all_took(*seconds: float) -> list[dict[str, Any]]:
        return [{"all": {"wall_seconds": s}} for s in seconds]

    pipeline = {
        "relexkit": all_took(9.0, 12.0, 8.0),
        "copied": all_took(10.0, 10.0, 10.0),
        "released": all_took(90.0, 144.0, 80.0),
        "disk": {"steps": 1.0, "checkpoints": 200.0},
    }
    memory = [
        {s: {"peak_bytes": n * 2**20} for s in ("import", "Gram", "extrapolate")} for n in (9, 1100)
    ]
    found = module.budgets({"pipeline": {"bfloat16": pipeline}, "memory": memory})
    assert [(b.what.split(",")[0], b.met) for b in found] == [
        ("import + Gram + one checkpoint", True),  # 0.9, 1.2, 0.8
        ("the same", False),  # 1/10, 1/12, 1/10
        ("steps on disk", True),
        ("peak memory of import", False),
        ("peak memory of Gram", False),
        ("peak memory of extrapolate", False),
    ]
    assert found[0].cells() == [found[0].what, "1", "0.9", "0.8 to 1.2", "met"]


@pytest.mark.slow
def test_every_part_runs_on_a_tiny_synthetic_run(tmp_path: Path) -> None:
    numbers, printed = run_program(tmp_path, "--question-tensors 12 --question-steps 9")
    for source in ("bfloat16", "float32"):
        check_pipeline(numbers["pipeline"][source])
        costs = numbers["targets"][source]["costs"]
        assert costs["4"][0]["left_bytes"] > 3 * costs["1"][0]["left_bytes"]
    check_agreement(numbers["agreement"])
    assert numbers["questions"]["inside"]["weights_read"] is False
    assert [row["source"] for row in numbers["memory"]] == ["bfloat16", "float32"]
    assert "Several targets in one command" in printed


@pytest.mark.slow
def test_scaling_and_peers_of_pca_run_on_tiny_stores(tmp_path: Path) -> None:
    program, out, figure = (
        PROGRAM.with_name("pca_scaling.py"),
        tmp_path / "numbers.json",
        tmp_path / "figure.png",
    )
    words = [
        "--only",
        "size",
        "peers",
        "--sizes",
        "3e4",
        "6e4",
        "--peer-size",
        "3e4",
        "--repeats",
        "1",
        "--json",
    ]
    command = [
        sys.executable,
        str(program),
        str(tmp_path / "work"),
        *words,
        str(out),
        "--plot",
        str(figure),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [case] = json.loads(out.read_text())["peers"]
    for name, rows in case["jobs"].items():
        truth = case["truth"]["centered" if rows[0].get("centered") else "uncentered"]
        assert rows[0]["ratios"] == pytest.approx(truth, abs=2e-2), name
    assert figure.stat().st_size > 0
    assert "| svd_compressed |" in done.stdout
