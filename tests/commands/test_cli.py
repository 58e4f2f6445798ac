"""The command line as a user meets it: exit codes, one-line errors, JSON alone on standard output,
words for odd runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Run, same_bits, write_run
from safetensors.torch import load_file

from relexkit import (
    Options,
    Output,
    Prediction,
    TrajectoryStore,
    __version__,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
    spectrum,
)
from relexkit.cli import main


@pytest.fixture(scope="module")
def run_(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(
        tmp_path_factory.mktemp("cli"),
        motion="drift",
        density=0.05,
        steps=(2, 3, 7, 8, 20),
        head="tied",
        metrics=True,
    )


@pytest.fixture(scope="module")
def kept(run_: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "run.zarr"
    return import_checkpoints(run_.source, path, base=run_.base).store.path


@pytest.fixture
def store(kept: str, tmp_path: Path) -> str:
    return str(shutil.copytree(kept, tmp_path / "run.zarr"))


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def parse(text: str) -> Any:
    """The one document in ``text``; NaN and Infinity are no JSON."""
    assert len(text.strip().splitlines()) == 1
    return json.loads(text, parse_constant=refuse_constant)


def ok(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Standard output and error of a command that succeeds."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return parse(ok(capsys, *arguments, "--json")[0])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that fails with status 1 and prints nothing
    else.
    """
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("relexkit: ")
    return line


def usage_error(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# -- one story through every command ---------------------------------------------------------------


def test_import_and_info(run_: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.zarr"
    document = as_json(
        capsys, "import", run_.source, "-o", path, "--base", run_.base, "--steps", "2:8"
    )
    assert document["steps"] == [2, 3, 7, 8]
    assert document["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert document["encodings"] == ["sparse"]
    assert document["exact"] is True
    assert document["metrics"] == ["reward"]
    out, err = ok(capsys, "import", run_.source, "-o", path, "--base", run_.base)
    assert "4 steps were recorded already" in err
    for said in (
        "5 steps from 2 to 20",
        "bit for bit",
        "lm_head.weight = model.embed_tokens.weight",
        "reward",
    ):
        assert said in out
    assert as_json(capsys, "info", path) == as_json(capsys, "info", path)
    assert (
        as_json(capsys, "info", path)["num_parameters"]
        == TrajectoryStore(path).layout.num_parameters
    )
    assert ok(capsys, "info", path)[0] == out


def test_import_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path, dtype="float32", motion="drift", density=1.0, base="step0", steps=(1, 2)
    )
    document = as_json(
        capsys,
        "import",
        run.source,
        "-o",
        tmp_path / "f.zarr",
        "--encoding",
        "float",
        "--mantissa-bits",
        7,
        "--steps",
        "0:2",
    )
    assert (document["mantissa_bits"], document["exact"], document["steps"]) == (7, False, [1, 2])
    assert as_json(capsys, "import", run.source, "-o", tmp_path / "e.zarr", "--encoding", "exact")[
        "encodings"
    ] == ["exact"]
    assert "7 mantissa bits" in ok(capsys, "info", tmp_path / "f.zarr")[0]


def test_verify(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, "verify", store) == {
        "path": store,
        "steps": [2, 3, 7, 8, 20],
        "verified": True,
    }
    assert (
        "every chunk of 5 steps from 2 to 20 and of the base is intact"
        in ok(capsys, "verify", store)[0]
    )
    [chunk] = [p for p in Path(store, "updates/0/data/c/3").rglob("*") if p.is_file()]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    assert "step 8, tensor" in fails(capsys, "verify", store)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "layer", "module", "global"])
def test_spectrum_json_equals_the_python_call(
    scope: str, centered: bool, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "spectrum",
        store,
        "--scope",
        scope,
        "--until",
        "8",
        *(["--centered"] if centered else []),
    ]
    document = as_json(capsys, *arguments)
    direct = spectrum(gram(TrajectoryStore(store)), scope=scope, until=8, centered=centered)
    assert document["steps"] == [2, 3, 7, 8]
    assert document["centered"] is centered
    assert [s["name"] for s in document["scopes"]] == [s.name for s in direct.scopes]
    for found, expected in zip(document["scopes"], direct.scopes, strict=True):
        promised = {
            "name",
            "num_parameters",
            "singular_values",
            "explained_variance_ratio",
            "coefficients",
            "r2",
        }
        assert promised <= set(found)
        assert found["num_parameters"] == expected.num_parameters
        assert found["singular_values"] == expected.singular_values.tolist()
        assert found["explained_variance_ratio"] == expected.explained_variance_ratio.tolist()
        np.testing.assert_array_equal(
            np.array(found["coefficients"]).reshape(4, -1), expected.coefficients
        )
        assert len(found["r2"]) == len(found["singular_values"])
    assert all(
        len(row) == len(s["singular_values"])
        for s in document["scopes"]
        for row in s["coefficients"]
    )


def test_spectrum_table(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = ok(capsys, "spectrum", store, "--scope", "global")
    assert "Spectrum of 5 steps from 2 to 20 (uncentered: about the base)" in out
    [row] = [
        line
        for line in out.splitlines()
        if line.split()[:1] == ["global"] and "parameters" not in line
    ]
    [found] = spectrum(gram(TrajectoryStore(store)), scope="global").scopes
    assert (
        f"{100 * found.explained_variance_ratio[0]:.1f} ({100 * found.null.expected['first']:.1f})"
        in row
    )
    assert f"{found.r2[0]:.3f}" in row
    assert "walk without direction" in out
    assert "Resolution: few weights change at a step" in out
    assert "centered: about the mean checkpoint" in ok(capsys, "spectrum", store, "--centered")[0]
    out, _ = ok(capsys, "spectrum", store)
    assert "Never moved, so there is no variance to explain: model.empty" in out


def test_spectrum_hides_small_rows_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (20 + i,) for i in range(45)}
    run = write_run(
        tmp_path, motion="drift", density=0.1, shapes=shapes, steps=(1, 2), extras=False
    )
    path = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path
    out, _ = ok(capsys, "spectrum", path)
    assert "(5 more rows hold less energy: --all shows them)" in out
    assert len(re.findall(r"^ *model\.layers\.", out, re.MULTILINE)) == 40
    assert (
        len(
            re.findall(
                r"^ *model\.layers\.", ok(capsys, "spectrum", path, "--all")[0], re.MULTILINE
            )
        )
        == 45
    )
    assert len(as_json(capsys, "spectrum", path)["scopes"]) == 45


def test_extrapolate_equals_the_python_call(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "extrapolate",
        store,
        "--to",
        60,
        90.5,
        "--until",
        8,
        "--rank",
        2,
        "--fit",
        "polynomial",
        "--degree",
        1,
        "--window",
        3,
        "--scope",
        "module",
        "--scale",
        0.5,
        "--dtype",
        "float16",
        "--seed",
        4,
    ]
    document = as_json(capsys, *arguments, "-o", tmp_path / "cli")
    folders = [str(tmp_path / "cli" / name) for name in ("step-60", "step-90.5")]
    assert document == [
        {
            "target": target,
            "folder": folder,
            "already": False,
            "method": "relex",
            "steps": [3, 8],
        }
        for target, folder in zip((60.0, 90.5), folders, strict=True)
    ]
    direct = extrapolate(
        TrajectoryStore(store),
        [60, 90.5],
        tmp_path / "python",
        Prediction(
            until=8,
            scope="module",
            scale=0.5,
            options=Options(rank=2, fit="polynomial", degree=1, window=3),
        ),
        output=Output(dtype="float16", seed=4),
    )
    for folder, prediction in zip(folders, direct, strict=True):
        assert (
            Path(folder, "model.safetensors").read_bytes()
            == (prediction.folder / "model.safetensors").read_bytes()
        )
    out, _ = ok(capsys, *arguments, "-o", tmp_path / "cli")
    assert out == "".join(
        f"step {t}: {f}, relex from steps 3 to 8 (was there already)\n"
        for t, f in zip(("60", "90.5"), folders, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--refit-every", 2],
        ["--fit", "polynomial"],
        ["--axis", "row"],
        ["--rounding", "nearest"],
        ["--method", "two-point"],
        ["--method", "two-point", "--anchor", 3],
        ["--method", "first-update", "--alpha", -1.5],
        ["--method", "hold"],
        ["--method", "least-squares"],
        ["--method", "least-squares-origin"],
    ],
)
def test_every_option_changes_the_result(
    options: list, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["extrapolate", store, "--to", 60]
    ok(capsys, *common, "-o", tmp_path / "plain")
    ok(capsys, *common, "-o", tmp_path / "other", *options)
    plain, other = (
        load_file(tmp_path / name / "step-60" / "model.safetensors") for name in ("plain", "other")
    )
    assert not all(same_bits(plain[n], other[n]) for n in plain)


def test_reconstruct_checkout_and_round(
    run_: Run, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = as_json(capsys, "checkout", store, "--step", 7, "-o", tmp_path / "seven")
    assert document == {"step": 7, "folder": str(tmp_path / "seven"), "exact": True}
    found = load_file(tmp_path / "seven" / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run_.weights[7].items())
    assert "step 0: " in ok(capsys, "checkout", store, "--step", 0, "-o", tmp_path / "zero")[0]
    assert checkout(TrajectoryStore(store), 7, tmp_path / "seven") == tmp_path / "seven"

    ok(
        capsys,
        "extrapolate",
        store,
        "--to",
        7,
        "--method",
        "reconstruct",
        "--rank",
        5,
        "--rounding",
        "nearest",
        "-o",
        tmp_path / "rebuilt",
    )
    rebuilt = load_file(tmp_path / "rebuilt" / "step-7" / "model.safetensors")
    # every direction is kept, so the step comes back but for values on a border between two
    # roundings
    close = [
        np.mean(rebuilt[n].float().numpy() == t.float().numpy())
        for n, t in run_.weights[7].items()
        if t.numel()
    ]
    assert min(close) > 0.99

    document = as_json(
        capsys,
        "round",
        tmp_path / "seven",
        "--dtype",
        "float16",
        "--seed",
        3,
        "-o",
        tmp_path / "half",
    )
    assert document == {
        "folder": str(tmp_path / "half"),
        "dtype": "float16",
        "rounding": "stochastic",
        "seed": 3,
    }
    assert (
        "float16, nearest rounding"
        in ok(
            capsys,
            "round",
            tmp_path / "seven",
            "--dtype",
            "float16",
            "--rounding",
            "nearest",
            "-o",
            tmp_path / "near",
        )[0]
    )


# -- runs that are odd but not wrong ---------------------------------------------------------------


def odd_store(folder: Path, **options: Any) -> str:
    run = write_run(folder, **options)
    return import_checkpoints(run.source, folder / "run.zarr", base=run.base).store.path


def test_one_step_says_what_it_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = odd_store(tmp_path, motion="drift", density=0.05, steps=(5,))
    out, _ = ok(capsys, "spectrum", path, "--scope", "layer")
    assert (
        "One recorded step: there is one direction by definition; record more steps to learn"
        " anything." in out
    )
    assert "nan" not in out.lower()
    for scope in ("tensor", "global"):
        document = as_json(capsys, "spectrum", path, "--scope", scope)
        assert document["steps"] == [5]
        assert all(r is None for s in document["scopes"] for r in s["r2"])
    assert "only step 5" in ok(capsys, "info", path)[0]
    line = fails(capsys, "extrapolate", path, "--to", 50, "-o", tmp_path / "out")
    assert "1 recorded step cannot fix a polynomial of degree 1; record more steps" in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    ok(capsys, "extrapolate", path, "--to", 50, "--method", "two-point", "-o", tmp_path / "out")


def test_steps_that_change_nothing_say_what_it_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = odd_store(tmp_path, density=0.0, steps=(5, 6, 9))
    out, _ = ok(capsys, "spectrum", path, "--scope", "global")
    assert "Never moved, so there is no variance to explain: global." in out
    assert "nan" not in out.lower()
    document = as_json(capsys, "spectrum", path)
    for s in document["scopes"]:
        assert s["singular_values"] == s["explained_variance_ratio"] == s["r2"] == []
        assert s["coefficients"] == [[]] * len(document["steps"])
        assert s["energy_share"] is None
    ok(capsys, "extrapolate", path, "--to", 50, "-o", tmp_path / "out")
    base, found = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "out/step-50/model.safetensors"),
    )
    assert all(same_bits(found[n], base[n]) for n in base)
    assert "nan" not in (tmp_path / "out/step-50/README.md").read_text().lower()


def test_float_rows_say_how_exact_they_are(
    float32_store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(shutil.copytree(float32_store.path, tmp_path / "run.zarr"))
    assert as_json(capsys, "checkout", path, "--step", 2, "-o", tmp_path / "two")["exact"] is False
    assert (
        "10 mantissa bits of the delta"
        in ok(capsys, "checkout", path, "--step", 2, "-o", tmp_path / "two")[0]
    )
    assert as_json(capsys, "checkout", path, "--step", 0, "-o", tmp_path / "zero")["exact"] is True
    document = as_json(capsys, "spectrum", path)
    assert all(s["unit_moves"] is None for s in document["scopes"])
    assert "Resolution" not in ok(capsys, "spectrum", path)[0]


# -- errors ----------------------------------------------------------------------------------------


def test_stated_errors_are_one_line(
    run_: Run, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    for message, arguments in {
        "no such store; expected a folder written by `relexkit import`": [
            "info",
            tmp_path / "missing",
        ],
        "is not a readable Zarr group|is not a trajectory store": ["info", tmp_path],
        "no such folder; expected one with a sub-folder for each step": [
            "import",
            tmp_path / "missing",
            "-o",
            out,
        ],
        "has no step 0, so the base is unknown; give the base model with --base DIR": [
            "import",
            run_.source,
            "-o",
            out,
        ],
        "--steps '1:2:3:4' is not a range": [
            "import",
            run_.source,
            "-o",
            out,
            "--base",
            run_.base,
            "--steps",
            "1:2:3:4",
        ],
        "--mantissa-bits 24 is out of range": [
            "import",
            run_.source,
            "-o",
            out,
            "--mantissa-bits",
            24,
        ],
        "--until 1 keeps no step; the store holds 5 steps from 2 to 20": [
            "spectrum",
            store,
            "--until",
            1,
        ],
        "--to 'soon' is not a number; expected an optimizer step": [
            "extrapolate",
            store,
            "--to",
            "soon",
            "-o",
            out,
        ],
        "--to nan is not a step": ["extrapolate", store, "--to", "nan", "-o", out],
        "--to -5 is not a step": ["extrapolate", store, "--to=-5", "-o", out],
        "--method magic is unknown; choose one of relex,": [
            "extrapolate",
            store,
            "--to",
            9,
            "--method",
            "magic",
            "-o",
            out,
        ],
        "--rank 0 is too small": ["extrapolate", store, "--to", 9, "--rank", 0, "-o", out],
        "--rank has no effect with --method hold, which takes no options": [
            "extrapolate",
            store,
            "--to",
            9,
            "--rank",
            2,
            "--method",
            "hold",
            "-o",
            out,
        ],
        "step 4 is not recorded in .*; it holds 5 steps from 2 to 20": [
            "checkout",
            store,
            "--step",
            4,
            "-o",
            out,
        ],
        "holds no weights; expected model.safetensors": ["round", tmp_path, "-o", out],
        "out: exists and is not|file: exists and": [
            "checkout",
            store,
            "--step",
            2,
            "-o",
            tmp_path / "file",
        ],
        "cannot be locked for writing": [
            "checkout",
            store,
            "--step",
            2,
            "-o",
            tmp_path / "file/in",
        ],
    }.items():
        assert re.search(message, fails(capsys, *arguments)), message
        assert not out.exists() or not list(out.iterdir()), arguments


@pytest.mark.parametrize(
    "value",
    [["--scale", "nan"], ["--scale", "inf"], ["--method", "first-update", "--alpha", "nan"]],
)
def test_numbers_that_are_none_are_refused_by_name(
    value: list[str], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "extrapolate", store, "--to", 60, "-o", tmp_path / "out", *value)
    assert f"{value[-2]} {value[-1]}" in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["info"],
        ["spectrum", "x", "--scope", "head"],
        ["extrapolate", "x", "--to", "5"],
        ["extrapolate", "x", "-o", "y"],
        ["extrapolate", "x", "--to", "5", "-o", "y", "--rank", "one"],
        ["extrapolate", "x", "--to", "5", "-o", "y", "--fit", "cubic"],
        ["checkout", "x", "-o", "y"],
        ["checkout", "x", "--step", "1.5", "-o", "y"],
        ["round", "x", "--dtype", "int8", "-o", "y"],
        ["info", "x", "--nonsense"],
        ["import", "x", "-o", "y", "--encoding", "zip"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: relexkit" in usage_error(capsys, arguments)


def test_debug_gives_the_traceback(tmp_path: Path) -> None:
    from relexkit import StoreError

    with pytest.raises(StoreError, match="no such store"):
        main(["info", str(tmp_path / "missing"), "--debug"])


@pytest.mark.parametrize("options", [[], ["--pca", "randomized"]])
def test_gram_that_can_keep_nothing_is_no_success(
    options: list[str],
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    copy = shutil.copytree(store, tmp_path / "s.zarr", ignore=shutil.ignore_patterns("gram"))
    with monkeypatch.context() as patch:
        patch.setattr("relexkit.store.durable.create", full)
        words = ("gram", str(copy), *options)
        assert "were computed but cannot be kept there" in fails(capsys, *words)
    assert main([*words]) == 0
    assert main([*words]) == 0


def relexkit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relexkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_as_a_process(store: str, tmp_path: Path) -> None:
    done = relexkit("spectrum", store, "--scope", "layer", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {s["name"] for s in parse(done.stdout)["scopes"]} >= {
        "layer 0",
        "layer 1",
        "embed_tokens",
    }
    stated = relexkit("checkout", store, "--step", 99, "-o", tmp_path / "out")
    assert (stated.returncode, stated.stdout) == (1, "")
    assert len(stated.stderr.splitlines()) == 1
    traced = relexkit("checkout", store, "--step", 99, "-o", tmp_path / "out", "--debug")
    assert traced.returncode == 1
    assert "Traceback (most recent call last)" in traced.stderr
    assert "StoreError: step 99 is not recorded" in traced.stderr
    assert relexkit("bake").returncode == 2
    assert relexkit("--version").stdout == f"relexkit {__version__}\n"


def test_help_is_quick_and_complete() -> None:
    code = (
        "import sys\nfrom relexkit.cli import main\ntry:\n    main(['extrapolate',"
        " '--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\nheavy ="
        " {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\nassert not heavy,"
        " heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (
        "--to",
        "--until",
        "--method",
        "--rank",
        "--fit",
        "--window",
        "--scope",
        "--scale",
        "--dtype",
        "--rounding",
        "--seed",
        "--json",
    ):
        assert option in done.stdout
