"""Code that comes with a model never runs unless ``--trust-remote-code`` is given, and nobody is
asked.
"""

from __future__ import annotations

import ast
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from relexkit import RelexkitError
from relexkit.cli import main
from relexkit.trainer.policy.setup import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with code of its own, which touches ``tmp_path / "ran"`` when it runs."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    for name, changes in {
        "config.json": {
            "model_type": "own",
            "architectures": ["OwnModel"],
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        },
    }.items():
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))
    return folder


@pytest.fixture(autouse=True)
def modules_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of models into a folder, which is read when it is imported."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_it_runs_only_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(RelexkitError, match=r"needs code of its own \(auto_map\), none of which"):
        load_model(str(model), cpu)
    with pytest.raises(RelexkitError, match="give --trust-remote-code if it may be run"):
        load_tokenizer(str(model))
    assert not (tmp_path / "ran").exists()
    loaded, tokenizer = load_model(str(model), cpu, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
    assert type(tokenizer).__name__ == "OwnTokenizer"
    assert (tmp_path / "ran").exists()


def test_the_command_never_asks_on_a_terminal(model: Path, tmp_path: Path) -> None:
    """On a terminal, with a ready ``y``."""
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\n")
    with subprocess.Popen(
        [sys.executable, "-m", "relexkit", "evaluate", str(model), "--task", "arithmetic"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    ) as process:
        os.close(theirs)
        _, said = process.communicate(timeout=300)
    shown = b""
    while select.select([ours], [], [], 0)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"relexkit: {model}: needs code of its own")
    assert b"[y/N]" not in shown
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["evaluate", "sweep", "probe", "g2d", "train", "tokens"])
def test_every_command_that_loads_models_has_the_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--trust-remote-code" in capsys.readouterr().out


def loads_without_saying(path: Path) -> list[str]:
    """Calls of ``Auto...from_pretrained`` and ``from_config`` without ``trust_remote_code``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value).rpartition(".")[2]
        loads = node.func.attr in ("from_pretrained", "from_config") and owner.startswith("Auto")
        if loads and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_no_model_is_loaded_without_saying_whether_its_code_may_run(tmp_path: Path) -> None:
    packages = ("relexkit", "trainer", "analysis")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert [place for path in files for place in loads_without_saying(path)] == []
    (tmp_path / "bad.py").write_text("transformers.AutoConfig.from_pretrained('x')\n")
    assert loads_without_saying(tmp_path / "bad.py") == ["bad.py:1"]
