"""Hub revisions, with the real client against a stand-in server."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from runs import Run, write_run

from relexkit import (
    CheckpointError,
    StoreError,
    TrajectoryStore,
    checkout,
    gram,
    import_checkpoints,
)
from relexkit.checkpoints.formats.hub import Hub, HubRun
from relexkit.cli import main

RUN, BASE = "hf://lab/rl-run", "hf://lab/base-model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five steps of about 25 kB. Read only."""
    return write_run(
        tmp_path_factory.mktemp("run"), dtype="bfloat16", head="tied", steps=[1, 2, 4, 7, 8]
    )


@pytest.fixture
def hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    branches = {"main": run.folders[8], **{f"step_{step}": run.folders[step] for step in run.steps}}
    server = HubServer({"lab/rl-run": branches, "lab/base-model": {"main": run.base}})
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.close()


def test_the_store_of_a_repository_is_that_of_the_folders(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    local = import_checkpoints(run.source, tmp_path / "local.zarr", base=run.base).store
    result = import_checkpoints(RUN, tmp_path / "hub.zarr", base=BASE)
    assert result.added == run.steps
    assert np.array_equal(result.store.checksums(), local.checksums())
    assert result.store.attributes["base"]["sha256"] == local.attributes["base"]["sha256"]
    assert (
        result.store.attributes["base"]["description"]
        == f"{BASE}@{hub.commit('lab/base-model', 'main')}"
    )
    assert np.array_equal(gram(result.store).matrices, gram(local).matrices)
    pinned = json.loads(result.store.files()["hub-revisions.json"])
    assert pinned["repository"] == "lab/rl-run"
    assert pinned["commits"] == {
        str(step): hub.commit("lab/rl-run", f"step_{step}") for step in run.steps
    }
    folder = checkout(result.store, 4, tmp_path / "four")
    assert not (folder / "hub-revisions.json").exists()


def test_the_disk_never_holds_more_than_two_checkpoints_and_none_afterwards(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    held: list[int] = []
    scratch = tmp_path / "s.zarr.download"

    def count() -> (
        None
    ):  # while the server is about to send a file: the folder that it goes to is there or not yet
        held.append(
            len([p for p in scratch.iterdir() if any(p.glob("*.safetensors"))])
            if scratch.is_dir()
            else 0
        )

    hub.on_file = count
    import_checkpoints(
        RUN, tmp_path / "s.zarr", base=BASE, memory_budget_bytes=0
    )  # so that the step before is read again
    assert max(held) == 1  # and the one that is being downloaded
    assert not scratch.exists()


def test_every_revision_is_downloaded_once(hub: HubServer, run: Run, tmp_path: Path) -> None:
    import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)
    weights = [r for r in hub.requests if r.startswith("GET") and r.endswith("model.safetensors")]
    assert len(weights) == len(set(weights)) == len(run.steps) + 1


def test_an_import_goes_on_with_new_branches(hub: HubServer, run: Run, tmp_path: Path) -> None:
    import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE, steps=":4")
    result = import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)
    assert (result.already, result.added) == ([1, 2, 4], [7, 8])


def test_what_an_interrupted_download_left_is_not_taken_for_a_checkpoint(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    def fail(path: str, content: bytes) -> bytes:
        sent = len([r for r in hub.requests if "GET" in r and r.endswith("model.safetensors")])
        return content if sent <= 3 else content[::-1]

    hub.spoil = fail
    with pytest.raises(
        CheckpointError,
        match=r"step 4: hf://lab/rl-run@\w+: .* arrived damaged .*; run the command again",
    ):
        import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]
    left = tmp_path / "s.zarr.download" / "lab--rl-run@x"  # as a killed process leaves it
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    hub.spoil = lambda path, content: content
    assert import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE).added == [4, 7, 8]
    assert not left.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_arrives_is_compared_with_the_hashes_of_the_hub(
    hub: HubServer, file: str, tmp_path: Path
) -> None:
    hub.spoil = lambda path, content: (
        content[:-1] + bytes([content[-1] ^ 1]) if path == file else content
    )
    with pytest.raises(
        CheckpointError,
        match=rf"{file} arrived damaged \(its hash is not the hub's\); run the command again",
    ):
        import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)
    assert not list(tmp_path.iterdir())


def test_a_branch_that_has_moved_is_refused(hub: HubServer, run: Run, tmp_path: Path) -> None:
    import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE, steps=":4")
    moved = shutil.copytree(run.folders[2], tmp_path / "moved")
    (moved / "config.json").write_text("{}")
    hub.repositories["lab/rl-run"]["step_2"] = moved
    with pytest.raises(
        CheckpointError,
        match=r"step 2 of hf://lab/rl-run is commit \w{12} now, but was \w{12} when the store",
    ):
        import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)


def test_labels_are_mapped_to_optimizer_steps(hub: HubServer, run: Run, tmp_path: Path) -> None:
    store = import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE, step_map="2").store
    assert store.steps.tolist() == [2 * step for step in run.steps]
    assert store.metrics()["label"].tolist() == run.steps


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "hf://lab/nothing",
            r"hf://lab/nothing: the hub did not give it \(.*\); check the name and your access",
        ),
        ("hf://lab", r"hf://lab: is not a hub repository; expected hf://OWNER/NAME"),
        (
            "hf://lab/rl-run@step_2",
            r"names one revision; expected hf://lab/rl-run, whose branches step_N are the steps",
        ),
        ("hf://lab/base-model", r"has no branches or tags named step_N; it has main"),
    ],
)
def test_a_repository_without_steps_is_refused(
    hub: HubServer, source: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        import_checkpoints(source, tmp_path / "s.zarr", base=BASE)
    assert not list(tmp_path.iterdir())


def test_a_commit_that_would_climb_out_of_the_folder_is_refused(
    hub: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"the server calls a commit '\.\./\.\./x'; expected hexadecimal digits",
    ):
        Hub(tmp_path / "scratch").open(RUN, "../../x")


def test_two_commits_for_one_step_are_refused(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.repositories["lab/rl-run"]["checkpoint-2"] = run.folders[7]
    with pytest.raises(
        CheckpointError, match=r"step 2 occurs twice in hf://lab/rl-run with different commits"
    ):
        import_checkpoints(RUN, tmp_path / "s.zarr", base=BASE)


def test_offline_mode_is_named(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"cannot be asked for, because HF_HUB_OFFLINE is set; unset it"
    ):
        HubRun(RUN, Hub(tmp_path / "d"))


def test_the_command_takes_a_repository(
    hub: HubServer, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", RUN, "--base", BASE, "-o", str(tmp_path / "s.zarr"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == run.steps
    assert document["source"] == "hub repository lab/rl-run"


def test_info_lists_the_steps_of_a_repository_without_a_download(
    hub: HubServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", RUN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == run.steps
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_base_by_reference_stays_in_the_cache_and_is_read_there(
    hub: HubServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    place = f"{BASE}@{hub.commit('lab/base-model', 'main')}"
    for source, name in ((RUN, "hub.zarr"), (run.source, "local.zarr")):
        out = tmp_path / name
        store = import_checkpoints(source, out, base=BASE, base_by_reference=True).store
        assert store.reference is not None
        assert (store.reference.place, dict(store.reference.tensors)) == (place, {})
        assert store.attributes["base"]["description"] == place
        assert "base" not in store.num_bytes()
        assert not (tmp_path / f"{name}.download").exists()
    weights = "GET /lab/base-model/resolve/" + place.partition("@")[2] + "/model.safetensors"
    assert hub.requests.count(weights) == 1
    asked = len(hub.requests)
    whole = import_checkpoints(run.source, tmp_path / "whole.zarr", base=run.base).store
    for part, spec in enumerate(whole.layout.parts):
        bits = TrajectoryStore(out).read_base(part, 0, spec.numel)
        np.testing.assert_array_equal(bits, whole.read_base(part, 0, spec.numel))
    assert len(hub.requests) == asked  # a commit that is there is not asked for

    shutil.rmtree(cache)
    TrajectoryStore(out).verify()  # downloaded again
    assert hub.requests.count(weights) == 2
    shutil.rmtree(cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=rf"cannot be read at {place} \(.*HF_HUB_OFFLINE is set"):
        TrajectoryStore(out).verify()
    monkeypatch.setenv("RELEXKIT_BASE", str(run.base))
    TrajectoryStore(out).verify()


def test_a_file_in_the_cache_that_is_not_the_hubs_is_no_base(
    hub: HubServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.spoil = lambda path, content: (
        content[:-1] + b"\0" if path.endswith(".safetensors") else content
    )
    for _ in range(2):  # arriving, and when it lies there
        with pytest.raises(CheckpointError, match=r"is damaged \(its hash is not the hub's\); del"):
            import_checkpoints(run.source, tmp_path / "s.zarr", base=BASE, base_by_reference=True)
    assert not (tmp_path / "s.zarr").exists()
