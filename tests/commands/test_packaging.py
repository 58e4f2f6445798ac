"""The promises of the package as a whole: light start, exit statuses, no private places in
files.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from relexkit.cli import main
from relexkit.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("relexkit", "trainer", "analysis")
HEAVY = ("transformers", "matplotlib", "torch", "pandas", "scipy")
COMMANDS = (
    "import",
    "watch",
    "info",
    "verify",
    "gram",
    "spectrum",
    "linearity",
    "backtest",
    "advise",
    "extrapolate",
    "checkout",
    "round",
    "report",
    "train",
    "evaluate",
    "sweep",
    "probe",
    "g2d",
    "tokens",
    "demo",
)


def our_files() -> list[Path]:
    """Every file that is ours: what git tracks or would, or, outside a clone, the sources."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(
            command, cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    tops = [
        ROOT / name
        for name in ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt")
    ]
    below = [
        path for name in (*PACKAGES, "tests", "docs", ".ci") for path in (ROOT / name).rglob("*")
    ]
    caches = re.compile(r"__pycache__|\.\w+_cache")
    return [
        path
        for path in (*tops, *below)
        if path.is_file() and not any(caches.fullmatch(part) for part in path.parts)
    ]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "start",
    [
        "import relexkit",
        "import relexkit.cli; relexkit.cli.commands()",
        (
            "from relexkit.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert"
            " e.code == 0"
        ),
        (
            "from relexkit.cli import main\ntry: main(['demo', '--help'])\nexcept SystemExit as e:"
            " assert e.code == 0"
        ),
    ],
)
def test_starting_loads_no_heavy_package(start):
    result = python(
        f"{start}\nimport sys\nprint('LOADED', [n for n in {HEAVY} if n in sys.modules])"
    )
    assert result.returncode == 0, result.stderr
    heavy = re.search(r"LOADED (\[.*\])", result.stdout)
    assert heavy is not None
    assert ast.literal_eval(heavy[1]) == []


def test_every_public_name_exists_and_is_listed_once():
    import relexkit

    assert len(set(relexkit.__all__)) == len(relexkit.__all__)
    for name in relexkit.__all__:
        assert getattr(relexkit, name) is not None


def test_console_command_is_installed_and_says_its_version():
    command = Path(sys.executable).with_name("relexkit")
    for given in ([str(command)], [sys.executable, "-m", "relexkit"]):
        result = subprocess.run([*given, "--version"], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout.strip(), result.stderr) == (
            0,
            f"relexkit {__version__}",
            "",
        )


def test_console_command_exits_2_on_wrong_usage_and_1_on_a_stated_error(tmp_path):
    for given, status in (
        (["no-such-command"], 2),
        ([], 2),
        (["info", str(tmp_path / "absent.zarr")], 1),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "relexkit", *given], capture_output=True, text=True, timeout=120
        )
        assert result.returncode == status, (given, result.stderr)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        if status == 1:
            assert re.fullmatch(r"relexkit: .*absent\.zarr.*\n", result.stderr)


@pytest.mark.parametrize(
    "given",
    [
        ["import", "source"],
        ["import", "source", "-o", "x.zarr", "--encoding", "none"],
        ["spectrum", "x.zarr", "--scope", "head"],
        ["extrapolate", "x.zarr", "-o", "out"],
        ["checkout", "x.zarr", "--step", "one", "-o", "out"],
        ["round", "source"],
        ["demo", "--no-such-option"],
        ["demo", "--steps", "many"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "usage: relexkit" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: relexkit {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+) {2,}", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted([*COMMANDS, "completion"])


def test_no_file_of_ours_names_a_private_place():
    """A path of the machine where a file was written works nowhere else, and says what is nobody's
    business.
    """
    names = ("work", "root", "home", "Users", "opt", "tmp", "mnt")
    places = re.compile(
        rb"(?<![\w.:/~\-])/(" + "|".join(names).encode() + rb")/[\w.]|[\w-]+\.internal\b"
    )
    files = our_files()
    assert len(files) > 20
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in files
        if path != Path(__file__)
        and path.suffix not in (".png", ".npz", ".npy", ".safetensors", ".zst")
        for match in places.finditer(path.read_bytes())
    ]
    assert found == []


def test_every_requirement_is_pinned():
    """``make`` installs under constraints.txt; a requirement that is missing there would float."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    extras = {
        name: found for name, found in project["optional-dependencies"].items() if name != "interop"
    }  # pinned itself
    wanted = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    missing = [r for r in wanted if re.split(r"[<>=!~ \[]", r)[0] not in {*pins, project["name"]}]
    assert missing == []
    assert pins["torch"] == "2.13.0"


def test_every_pin_is_installed():
    """The environment that runs these tests is the pinned one: the same versions, whatever build of
    torch.
    """
    from importlib.metadata import version

    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    found = {name: version(name).split("+")[0] for name, _ in pins}
    assert found == dict(pins), "make installs them"


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) == 11358


def test_make_targets_run_what_they_say():
    """A dry run of every target: its last command is the one that the README promises."""
    pytest_command = "OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile"
    ends = {
        "demo": ".venv/bin/relexkit demo -o x",
        "test": f"{pytest_command} -o x",
        "test-all": f"{pytest_command} -m 'slow or not slow' -o x",
        "check": pytest_command,
        "docs": ".venv/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build -o x",
        "bench": ".venv/bin/python tests/benchmarks/run.py -o x",
    }
    make = shutil.which("make")
    assert make is not None
    for target, end in ends.items():
        command = [make, "--dry-run", "--no-print-directory", target, "ARGS=-o x"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip().splitlines()[-1] == end


def test_ci_calls_make_check():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-3:] == ["make check", "make test-kernels", "make docs"]
