"""A training goes on after parts of its folder were lost or damaged, or says why not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import assert_same_run, settings
from tiny_models import save_tiny_model

from relexkit import Recorder, RelexkitError, TrajectoryStore
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.state import last_state
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.setup import load_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four steps."""
    place = tmp_path_factory.mktemp("whole")
    save_tiny_model(place / "base")
    return train(options(place, max_steps=4))


def options(place: Path, **more: object) -> GRPOConfig:
    return settings(place / "base", place / "run", save_steps=2, **more)


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """The same run after two steps."""
    shutil.copytree(whole.parent / "base", tmp_path / "base")
    train(options(tmp_path, max_steps=2))
    return tmp_path


def test_a_lost_store_begins_anew_over_the_base_of_the_run_and_says_so(
    begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(begun / "run/run.zarr")
    folder = train(options(begun, max_steps=4))
    said = capsys.readouterr().err
    assert re.search(r"going on after step 2; .*run\.zarr was missing, so it lacks what was", said)
    store, expected = TrajectoryStore(folder / "run.zarr"), TrajectoryStore(whole / "run.zarr")
    assert store.steps.tolist() == [2, 3, 4]
    assert store.attributes["base"]["sha256"] == expected.attributes["base"]["sha256"]
    assert np.array_equal(store.checksums(), expected.checksums()[1:])


def test_an_older_copy_of_the_store_gets_the_step_of_the_state_and_says_so(
    begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from relexkit.store import StoreWriter

    with StoreWriter(begun / "run/run.zarr") as writer:
        writer.truncate(1)
    folder = train(options(begun, max_steps=4))
    assert "run.zarr ended with step 1, so it lacks what was recorded" in capsys.readouterr().err
    store, expected = TrajectoryStore(folder / "run.zarr"), TrajectoryStore(whole / "run.zarr")
    assert store.steps.tolist() == [1, 2, 3, 4]
    assert np.array_equal(store.checksums(), expected.checksums())


def test_a_store_that_is_ahead_of_the_state_goes_back_to_it(begun: Path, whole: Path) -> None:
    model, _ = load_model(str(begun / "run/final"), torch.device("cpu"))
    with Recorder(model, begun / "run/run.zarr", resume_from=2, compare=False) as recorder:
        recorder.record(3, {"reward": 1.0})  # of steps whose state was not saved before the cut
    assert_same_run(whole, train(options(begun, max_steps=4)))


@pytest.mark.parametrize("content", [b"", b"odd bytes", None], ids=["empty", "odd", "missing"])
def test_a_damaged_state_is_named_and_without_it_the_run_begins_again(
    content: bytes | None, begun: Path, whole: Path
) -> None:
    path = begun / "run/state/step-2/process-0.pt"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    words = r"was saved by 0 processes" if content is None else rf"{path}: is damaged \(.*remove"
    with pytest.raises(RelexkitError, match=words) as refused:
        train(options(begun, max_steps=4))
    assert "\n" not in str(refused.value)
    assert last_state(begun / "run/state") == 2
    shutil.rmtree(path.parent)
    assert_same_run(whole, train(options(begun, max_steps=4)))


@pytest.mark.parametrize(
    ("more", "dropped"),
    [
        (b'{"step": 3, "rew', "a damaged line was dropped"),
        (b"\xff\xfe\x00\n[1]\nnull\n", "3 damaged lines were dropped"),
        (b"[" * 100_000 + b'\n{"step": "3"}\n', "2 damaged lines were dropped"),
    ],
    ids=["torn", "odd", "deep"],
)
def test_a_damaged_line_of_the_log_is_dropped_with_a_word(
    more: bytes, dropped: str, begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(begun / "run/metrics.jsonl", "ab") as file:
        file.write(more)
    assert [entry["step"] for entry in read_log(begun / "run")] == [1, 2]
    folder = train(options(begun, max_steps=4))
    assert dropped in capsys.readouterr().err
    assert_same_run(whole, folder)


def test_a_lost_configuration_is_named(begun: Path) -> None:
    (begun / "run/config.yaml").write_bytes(b"")
    with pytest.raises(RelexkitError, match=r"config\.yaml: holds no options; expected those of"):
        train(options(begun, max_steps=4))


def test_a_run_killed_in_its_first_moment_begins_again(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml.partial").write_text("model: ba")
    folder = train(options(tmp_path, max_steps=1))
    assert TrajectoryStore(folder / "run.zarr").steps.tolist() == [1]
    assert not (folder / "config.yaml.partial").exists()


def test_a_final_model_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relexkit.trainer.loop import folder as place

    save_tiny_model(tmp_path / "base")

    def full(temporary: Path, final: Path) -> None:
        assert (temporary / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, "replace_folder", full)
        with pytest.raises(OSError, match="No space left"):
            train(options(tmp_path, max_steps=1))
    assert not (tmp_path / "run" / ".final.partial").exists()
    assert (train(options(tmp_path, max_steps=1)) / "final" / "model.safetensors").exists()
