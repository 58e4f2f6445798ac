"""A second type checker reads the examples of the documents as a user's own code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRONG = 'rk.open(3)\nrk.spectrum("run.zarr", scoop="layer")\n'


def test_the_examples_have_the_types_that_they_say(tmp_path: Path) -> None:
    for name in ("docs/python.md", "README.md"):
        text = (ROOT / name).read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        head = "from typing import Any\n\nmodel: Any = None\n"
        (tmp_path / f"{Path(name).stem}_example.py").write_text(head + "\n".join(blocks))
    (tmp_path / "wrong.py").write_text(f"import relexkit as rk\n\n{WRONG}")
    settings = {
        "typeCheckingMode": "standard",
        "extraPaths": [str(ROOT)],
        "reportUnusedExpression": "none",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [str(Path(sys.executable).with_name("basedpyright")), "--outputjson"]
    command += ["--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = [
        (Path(d["file"]).name, d["range"]["start"]["line"], d["message"])
        for d in json.loads(result.stdout)["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    assert [line for name, line, _ in found if name == "wrong.py"] == [2, 3], found
    assert [one for one in found if one[0] != "wrong.py"] == []
