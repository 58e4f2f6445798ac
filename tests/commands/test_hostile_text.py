"""Names from a store or checkpoint never steer the terminal, whatever a command does with them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from stores import store_of

from relexkit.cli import main
from relexkit.errors import printable
from relexkit.store.format import json_checksum

HOSTILE = "\x1b]0;gone\x07\x1b[31mlayers.0\x9b2J\u202e.weight\ud800"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tensors, source and base carry escapes."""
    path = tmp_path_factory.mktemp("hostile") / "s.zarr"
    random = np.random.default_rng(0)
    deltas = random.standard_normal((8, 40)).cumsum(axis=0)
    store_of(path, {"layers.0.weight": deltas}, np.arange(1, 9), metrics={"reward": np.arange(8)})
    group = zarr.open_group(str(path), mode="r+")
    attributes = dict(group.attrs)["relexkit"]
    text = json.dumps(attributes).replace("layers.0.weight", json.dumps(HOSTILE)[1:-1])
    attributes = json.loads(text) | {"source": HOSTILE}
    attributes["base"]["description"] = HOSTILE
    content = {key: value for key, value in attributes.items() if key != "checksum"}
    group.attrs["relexkit"] = content | {"checksum": json_checksum(content)}
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["verify"],
        ["gram"],
        ["spectrum", "--scope", "tensor"],
        ["backtest"],
        ["advise"],
        ["linearity"],
        ["checkout", "--step", "3"],
        ["extrapolate", "--to", "9"],
        ["extrapolate", "--to", "9", "--scope", "nothing"],
    ],
    ids=" ".join,
)
def test_no_command_prints_them(
    command: list[str], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    out = ["-o", str(tmp_path / "out")] if name in ("checkout", "extrapolate") else []
    for more in ([], ["--json"]):
        with contextlib.suppress(SystemExit):  # wrong usage
            main([name, str(store), *options, *out, *more])
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert text.isascii() or not any(c in text for c in "\x1b\x07\x9b\u202e\ud800")
            assert "\x1b" not in text


def test_only_what_steers_is_escaped() -> None:
    assert printable("a\tb\nö 日本 R² …") == "a\tb\nö 日本 R² …"
    assert printable(HOSTILE) == (r"\x1b]0;gone\x07\x1b[31mlayers.0\x9b2J\u202e.weight\ud800")
