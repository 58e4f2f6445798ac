"""Help, spelling, suggestions and completion of the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relexkit.cli import command_parser, commands, main
from relexkit.predict.extrapolators import METHODS


def help_of(name: str) -> str:
    return command_parser(name, commands()[name].load(name)).format_help()


def test_the_overview_names_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z0-9]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(commands())


@pytest.mark.parametrize("name", commands())
@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_and_has_examples_that_parse(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = help_of(name)
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert not re.search(r"--[a-z-]+_", text), "options are shown with dashes"
    examples = commands()[name].examples
    assert len(examples) >= 2
    parser = command_parser(name, commands()[name].load(name))
    for example in examples:
        parser.parse_args(example.split(" >> ")[0].split(" | ")[0].split())
    if {"method", "scope"} & {action.dest for action in parser._actions} and "method" in text:
        assert all(method.about[:20] in text for method in METHODS.values()) or (
            "methods:" not in text
        )


def test_meanings_of_methods_and_scopes_come_from_their_tables() -> None:
    text = " ".join(help_of("extrapolate").split())
    assert all(f"{name} {' '.join(m.about.split())}" in text for name, m in METHODS.items())
    assert "module the same module of all layers together" in text


@pytest.mark.parametrize(
    "words",
    [
        ["s.zarr", "--to", "5", "--output", "there", "--refit_every", "3"],
        ["s.zarr", "--to=5", "--out=there", "--refit-every=3"],
        ["s.zarr", "--to", "5", "-o", "there", "--refit_every=3"],
    ],
)
def test_spellings_mean_the_same(words: list[str]) -> None:
    owner = commands()["extrapolate"].load("extrapolate")
    parsed = command_parser("extrapolate", owner).parse_args(words)
    assert (parsed.out, parsed.to, parsed.refit_every) == ("there", [5.0], 3)


def test_options_of_a_configuration_take_dashes() -> None:
    owner = commands()["train"].load("train")
    for word in ("--max-completion-length", "--max_completion_length"):
        parsed = command_parser("train", owner).parse_args([word, "7"])
        assert parsed.max_completion_length == "7"


def test_what_is_nearly_right_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["spectrm", "run.zarr"])
    assert "no command 'spectrm'; did you mean spectrum?" in capsys.readouterr().err
    for words, meant in (
        (["spectrum", "r.zarr", "--untill", "5"], "--until"),
        (["train", "--max-stepss=3"], "--max-steps"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["spectrum", "r.zarr", "--colour", "red"])
    assert "did you mean" not in capsys.readouterr().err


def complete_in(shell: str, words: str, tmp_path: Path) -> list[str]:
    """What ``shell`` offers after ``words``."""
    binary = tmp_path / "bin"
    binary.mkdir(exist_ok=True)
    script = binary / "relexkit"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m relexkit "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{binary}:{os.environ['PATH']}"}
    code = subprocess.run(
        [script, "completion", shell], capture_output=True, text=True, check=True, env=environment
    ).stdout
    if shell == "bash":
        ask = (
            f"{code}\nCOMP_LINE={words!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; COMP_KEY=9\n"
            f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}\n"
            '_python_argcomplete relexkit; printf "%s\\n" "${COMPREPLY[@]}"'
        )
    else:
        ask = f"{code}\ncomplete -C {words!r}"
    found = subprocess.run(
        [shell, "-c", ask], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    return [line.split("\t")[0].strip() for line in found.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shells_complete_commands_options_and_choices(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert complete_in(shell, "relexkit spec", tmp_path) == ["spectrum"]
    assert "--method" in complete_in(shell, "relexkit extrapolate --me", tmp_path)
    assert complete_in(shell, "relexkit spectrum --scope glo", tmp_path) == ["global"]


def test_zsh_takes_the_script(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    code = subprocess.run(
        [sys.executable, "-m", "relexkit", "completion", "zsh"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ask = f"autoload -U compinit; compinit -u -D\n{code}\nprint $_comps[relexkit]"
    found = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.strip() == "_python_argcomplete"
    assert found.stderr == ""
