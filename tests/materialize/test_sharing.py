"""Uploads through the real client against a stand-in for the hub; recipes against the sum that they
mean.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import HEAD, Run, write_run
from safetensors.torch import load_file

import relexkit as rk
from relexkit.cli import main
from relexkit.materialize.sharing import base_repository, mergekit_config, model_index


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits; every file is small enough to travel inside the commit."""

    repositories: dict[str, dict[str, bytes]]
    cards: dict[str, dict]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name in self.cards:
            self._json({"id": name, "siblings": [], "cardData": self.cards[name]})
        else:
            self._json({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "forbidden":
                return self._json({"error": "not yours"}, 403)
            self.repositories.setdefault(name, {})
            place = "datasets/" * (asked.get("type") == "dataset")
            return self._json({"url": f"https://huggingface.co/{place}{name}"})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        kind, owner, name, action = self.path.partition("?")[0].split("/")[2:6]
        if action == "preupload":
            files = [
                {**f, "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert (action, kind in ("models", "datasets")) == ("commit", True)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.repositories[f"{owner}/{name}"][entry["value"]["path"]] = content
        self._json(
            {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"https://huggingface.co/{owner}/{name}/commit/0",
            }
        )

    def _json(self, document: object, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"repositories": {}, "cards": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import huggingface_hub

    plain = huggingface_hub.HfApi
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: plain(endpoint=url, token="hf_stand_in"))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("sharing")
    run = write_run(
        folder, motion="drift", density=0.5, steps=range(1, 9), head="tied", extras=False
    )
    config = run.folders[1] / "config.json"
    for step in run.folders.values():
        known = json.loads(config.read_text()) | {"_name_or_path": "org/base-model"}
        (step / "config.json").write_text(json.dumps(known))
    rk.import_checkpoints(run.source, folder / "run.zarr", base=run.base)
    return run, folder / "run.zarr"


def metadata(card: bytes | str) -> dict:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(text.split("---\n")[1])


def test_a_prediction_is_pushed_with_its_card(made, hub, tmp_path: Path, capsys) -> None:
    _, store = made
    hub.cards["org/base-model"] = {"license": "mit"}
    given = ["extrapolate", str(store), "--to", "20", "-o", str(tmp_path / "out")]
    assert main([*given, "--push", "me/predicted"]) == 0
    assert "pushed to " in capsys.readouterr().err
    files = hub.repositories["me/predicted"]
    folder = tmp_path / "out" / "step-20"
    assert set(files) == {p.name for p in folder.iterdir()}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    found = metadata(files["README.md"])
    assert found["base_model"] == "org/base-model"
    assert found["base_model_relation"] == "finetune"
    assert found["license"] == "mit"
    assert found["tags"] == ["relexkit", "extrapolated"]
    assert found["library_name"] == "transformers"
    assert b"# Extrapolated checkpoint, step 20" in files["README.md"]


def test_an_evaluation_becomes_the_model_index(made, hub, tmp_path: Path) -> None:
    (written,) = rk.extrapolate(made[1], [20], tmp_path / "out")
    greedy = {"accuracy": 0.75, "interval": [0.7, 0.8]}
    document = {
        "task": "sorting",
        "split": "validation",
        "models": [{"name": "x", "greedy": greedy}],
    }
    (tmp_path / "e.json").write_text(json.dumps(document))
    address = rk.push(written.folder, "me/scored", evaluation=tmp_path / "e.json")
    assert address.endswith("/me/scored")
    (entry,) = metadata(hub.repositories["me/scored"]["README.md"])["model-index"]
    (result,) = entry["results"]
    assert result["dataset"]["name"] == "sorting"
    assert result["metrics"][0]["value"] == 0.75
    assert "0.700 to 0.800" in result["metrics"][0]["name"]
    from huggingface_hub import ModelCard

    card = ModelCard(hub.repositories["me/scored"]["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.75
    with pytest.raises(rk.RelexkitError, match="an evaluation of 0 models"):
        model_index("x", {"task": "t"})


def test_a_store_is_pushed_as_a_data_set(made, hub, tmp_path: Path) -> None:
    address = rk.push(made[1], "me/run")
    assert address.endswith("datasets/me/run") or "me/run" in address
    files = hub.repositories["me/run"]
    there = {str(p.relative_to(made[1].parent)) for p in made[1].rglob("*") if p.is_file()}
    assert there == {name for name in files if name != "README.md"}
    for name in there:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files[name])
    rk.verify(tmp_path / "run.zarr")
    assert metadata(files["README.md"])["tags"] == ["relexkit", "trajectory"]
    assert b"8 steps from 1 to 8" in files["README.md"]


def test_refusals_are_one_line(made, hub, tmp_path: Path) -> None:
    with pytest.raises(rk.RelexkitError, match="'me' is not a repository; expected ORG/NAME"):
        rk.push(made[1], "me")
    with pytest.raises(rk.RelexkitError, match="neither a store nor a checkpoint folder"):
        rk.push(tmp_path, "me/x")
    with pytest.raises(rk.RelexkitError, match="forbidden/x: the hub refused"):
        rk.push(made[1], "forbidden/x")


def test_the_base_is_named_only_where_it_is_on_the_hub() -> None:
    cached = {"description": "snapshots/models--Qwen--Qwen3-4B/snapshots/abc"}
    assert base_repository(cached) == "Qwen/Qwen3-4B"
    assert base_repository({"description": "hf://Qwen/Qwen3-4B@step_1"}) == "Qwen/Qwen3-4B"
    assert base_repository({"description": "folder"}, b'{"_name_or_path": "a/b"}') == "a/b"
    assert base_repository({"description": "runs/checkpoints/base"}, b"{}") is None


def test_a_recipe_means_the_written_prediction(made, tmp_path: Path) -> None:
    """The sum that mergekit's task arithmetic documents, computed here from whole checkpoints."""
    run, path = made
    prediction = rk.Prediction(scope="global")
    text = rk.mergekit_config(path, 12, prediction, checkpoint="run/checkpoint-{step}", base="b")
    recipe = yaml.safe_load(text)
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["base_model"] == "b"
    assert recipe["parameters"] == {"normalize": False}
    output = rk.Output(dtype="float32")
    (written,) = rk.extrapolate(path, [12], tmp_path, prediction, output=output)
    found = load_file(written.folder / "model.safetensors")
    for name in run.weights[0]:
        if name == HEAD:
            continue
        base = run.weights[0][name].double().numpy()
        total = base.copy()
        for model in recipe["models"]:
            step = int(model["model"].rpartition("-")[2])
            delta = run.weights[step][name].double().numpy() - base
            total += model["parameters"]["weight"] * delta
        np.testing.assert_allclose(found[name].numpy(), total, atol=1e-5)
    with pytest.raises(rk.RelexkitError, match='ask for Prediction\\(scope="global"\\)'):
        mergekit_config(rk.TrajectoryStore(path), 12)
