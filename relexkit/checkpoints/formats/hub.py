"""Revisions of a Hugging Face hub repository as a run: branches or tags ``step_N``, one checkpoint
each.

A revision is downloaded when it is needed, checked against the hub's own hashes, differenced and
deleted, so that the disk never holds more than two checkpoints. Every step is pinned to the commit
that its name pointed to; the store keeps them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from relexkit.checkpoints import Checkpoint, open_checkpoint
from relexkit.checkpoints.runs import labels_by_step, read_step_map
from relexkit.checkpoints.small_files import is_model_file
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError

SCHEME = "hf://"
REVISIONS_FILE = "hub-revisions.json"
"""File in a store: repository and commit of every step that was there when the store was created.
"""

MOST_CHECKPOINTS = 2
_REPOSITORY = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_STEP = re.compile(r"(?:step|checkpoint|global_step)[_-]?(\d{1,15})")
_WEIGHTS = re.compile(
    r"[^/]+\.(?:safetensors|index\.json)|(?:pytorch|adapter)_model[^/]*\.bin|adapter_config\.json"
    r"|trainer_state\.json"
)


def is_hub(source: str | Path) -> bool:
    """True if a source or a base is written ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``."""
    return str(source).startswith(SCHEME)


class Hub:
    """Downloads into ``scratch``, with at most two checkpoints there at a time. Nothing is left
    there after ``close``.

    Args:
        scratch: folder of our own; what an interrupted import left there is removed.
    """

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._in_use: dict[
            tuple[str, str], int
        ] = {}  # how often each is open; in the order of last use
        shutil.rmtree(scratch, ignore_errors=True)

    def steps(self, source: str) -> dict[int, str]:
        """Step -> commit, of the branches and tags that are named for a step.

        Raises:
            CheckpointError: no such repository, no such branches, or two commits for one step.
        """
        name, revision = _parse(source)
        if revision:
            raise CheckpointError(
                f"{source}: names one revision; expected {SCHEME}{name}, whose branches step_N are"
                " the steps"
            )
        refs = _ask(source, lambda: _api().list_repo_refs(name))
        commits: dict[int, str] = {}
        for ref in (*refs.branches, *refs.tags):
            match = _STEP.fullmatch(ref.name)
            if match is None:
                continue
            step = int(match[1])
            if commits.setdefault(step, ref.target_commit) != ref.target_commit:
                raise CheckpointError(
                    f"step {step} occurs twice in {source} with different commits; expected one"
                    " branch or tag a step"
                )
        if not commits:
            held = ", ".join(sorted(ref.name for ref in refs.branches)[:5])
            raise CheckpointError(
                f"{source}: has no branches or tags named step_N; it has {held or 'none'}: give"
                " --base and folders"
            )
        return commits

    def open(self, source: str, commit: str | None = None) -> HubCheckpoint:
        """Open one revision, downloaded if it is not there; close it to make room for others.

        Raises:
            CheckpointError: it cannot be downloaded, or what arrived is not what the hub has.
        """
        name, _ = _parse(source)
        commit = _commit(source, commit)
        key = (name, commit)
        folder = self._scratch / f"{name.replace('/', '--')}@{commit}"
        if key not in self._in_use:
            self._make_room()
            self._in_use[key] = 0
            try:
                self._download(name, commit, folder)
            except BaseException:
                del self._in_use[key]
                shutil.rmtree(folder, ignore_errors=True)
                raise
        self._in_use[key] = self._in_use.pop(key) + 1
        try:
            return HubCheckpoint(
                open_checkpoint(folder), f"{SCHEME}{name}@{commit}", lambda: self._release(key)
            )
        except BaseException:
            self._release(key)
            raise

    def close(self) -> None:
        """Delete everything that was downloaded."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._in_use.clear()

    def _release(self, key: tuple[str, str]) -> None:
        if key in self._in_use:
            self._in_use[key] -= 1

    def _make_room(self) -> None:
        for name, commit in [key for key, count in self._in_use.items() if count == 0]:
            if len(self._in_use) >= MOST_CHECKPOINTS:
                shutil.rmtree(self._scratch / f"{name.replace('/', '--')}@{commit}")
                del self._in_use[name, commit]
        assert len(self._in_use) < MOST_CHECKPOINTS, "two checkpoints are in use"

    def _download(self, name: str, commit: str, folder: Path) -> None:
        where = f"{SCHEME}{name}@{commit}"
        files = _files(name, commit)
        for path, entry in files.items():
            _ask(
                where,
                partial(_api().hf_hub_download, name, path, revision=commit, local_dir=folder),
            )
            _check_content(folder / path, entry, where)


def in_cache(source: str, *, check: bool = False) -> HubCheckpoint:
    """Open one revision in the cache of the hub's client, where it stays; downloaded if it is not
    there whole. A commit that is there is not asked for.

    Args:
        check: compare the files with the hub's hashes also if they were there already.

    Raises:
        CheckpointError: see ``Hub.open``.
    """
    name, revision = _parse(source)
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    commit = _commit(source, revision if is_commit else None)
    where = f"{SCHEME}{name}@{commit}"
    folder = _cached(name, commit)
    if folder is None:
        for path in _files(name, commit):
            _ask(where, partial(_api().hf_hub_download, name, path, revision=commit))
        folder, check = _cached(name, commit), True
    if folder is None:
        raise CheckpointError(f"{where}: is not whole in the hub's cache; run the command again")
    for link in folder.rglob("*") if check else ():
        blob = link.resolve()  # its name is the hub's hash
        digits = len(blob.name) if re.fullmatch("[0-9a-f]+", blob.name) else 0
        if digits in (40, 64) and _hash(blob, is_large=digits == 64) != blob.name:
            raise CheckpointError(
                f"{where}: {blob} is damaged (its hash is not the hub's); delete it and run the"
                " command again"
            )
    return HubCheckpoint(open_checkpoint(folder), where, lambda: None)


def _cached(name: str, commit: str) -> Path | None:
    """The folder of a revision in the cache; None if it is not there, or not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
        open_checkpoint(folder).close()
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder


def _commit(source: str, commit: str | None) -> str:
    """The commit of a revision, asked for if it is not known, and checked."""
    if commit is None:
        name, revision = _parse(source)
        info = _ask(source, lambda: _api().model_info(name, revision=revision))
        commit = str(info.sha)
    if not _COMMIT.fullmatch(commit):  # it becomes part of a folder's name
        raise CheckpointError(
            f"{source}: the server calls a commit {commit[:80]!r}; expected hexadecimal digits"
        )
    return commit


def _files(name: str, commit: str) -> dict[str, Any]:
    """Path -> entry of the files of a revision that a checkpoint is read from."""
    where = f"{SCHEME}{name}@{commit}"
    tree = _ask(where, lambda: list(_api().list_repo_tree(name, revision=commit, recursive=True)))
    files = {
        entry.path: entry
        for entry in tree
        if hasattr(entry, "blob_id")
        and (_WEIGHTS.fullmatch(entry.path) or is_model_file(entry.path, with_code=True))
    }
    if any(path.endswith(".safetensors") for path in files):
        files = {
            path: entry
            for path, entry in files.items()
            if not path.endswith((".bin", ".bin.index.json"))
        }
    if not files:
        raise CheckpointError(
            f"{where}: holds no weights; expected safetensors or pytorch_model.bin"
        )
    return files


def _api() -> Any:
    """Loaded when the hub is asked: other imports have one as well, and it takes half a second."""
    from huggingface_hub import HfApi

    return HfApi()


def _ask(where: str, ask: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return ask()
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{where}: cannot be asked for, because HF_HUB_OFFLINE is set; unset it"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError)
        ):
            raise  # the disk
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{where}: the hub did not give it ({reason}); check the name and your access, and"
            " run again"
        ) from None
    except Exception as error:  # the client's transport has kinds of errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{where}: cannot be downloaded ({reason}); run the command again to go on"
        ) from None


class HubCheckpoint(CheckpointView):
    """A downloaded revision; see ``relexkit.checkpoints.Checkpoint``."""

    def __init__(self, inner: Checkpoint, description: str, release: Callable[[], None]):
        super().__init__(inner)
        self.description, self._release = description, release
        self.revisions: Mapping[str, Any] = {}

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, and for a run the commits of its steps."""
        pinned = (
            {REVISIONS_FILE: (json.dumps(self.revisions, indent=2) + "\n").encode()}
            if self.revisions
            else {}
        )
        return {**super().files(), **pinned}

    def close(self) -> None:
        """Close it; its files may be deleted from now on."""
        super().close()
        self._release()
        self._release = lambda: None


class HubRun:
    """The step branches of a repository; see ``relexkit.checkpoints.Run``.

    Args:
        step_map: see ``relexkit.checkpoints.open_run``.
    """

    def __init__(self, source: str, hub: Hub, step_map: str | None = None):
        self._source, self._hub = source, hub
        by_label = hub.steps(source)
        self.left_out: dict[str, str] = {}
        self._mapped = step_map is not None
        self._labels = labels_by_step(
            sorted(by_label), read_step_map(step_map) if step_map else None, self.left_out
        )
        self.commits = {step: by_label[label] for step, label in self._labels.items()}
        self.steps = sorted(self.commits)
        self.description = f"hub repository {source.removeprefix(SCHEME)}"
        self.notes = [f"read as {len(self.steps)} revisions of {self.description}"]
        if not self.steps:
            raise CheckpointError(
                f"{source}: the step map leaves no step; expected the labels {sorted(by_label)[:5]}"
            )

    def checkpoint(self, step: int) -> HubCheckpoint:
        """Open one step, downloaded if need be.

        Raises:
            CheckpointError: see ``Hub.open``; the message names the step.
        """
        try:
            checkpoint = self._hub.open(self._source, self.commits[step])
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None
        commits = {str(s): commit for s, commit in sorted(self.commits.items())}
        checkpoint.further = {"label": float(self._labels[step])} if self._mapped else {}
        checkpoint.revisions = {"repository": self._source.removeprefix(SCHEME), "commits": commits}
        return checkpoint

    def check_commits(self, files: Mapping[str, bytes], recorded: list[int]) -> None:
        """The recorded steps still are the commits that the store names.

        Raises:
            CheckpointError: a branch has moved.
        """
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            pinned = json.loads(files[REVISIONS_FILE])["commits"]
            for step in recorded:
                then, now = pinned.get(str(step)), self.commits.get(step)
                if then and now and then != now:
                    raise CheckpointError(
                        f"step {step} of {self._source} is commit {now[:12]} now, but was"
                        f" {str(then)[:12]} when the store was made; choose another -o"
                    )


def _parse(source: str) -> tuple[str, str | None]:
    match = _REPOSITORY.fullmatch(str(source))
    if match is None:
        raise CheckpointError(
            f"{source}: is not a hub repository; expected {SCHEME}OWNER/NAME or"
            f" {SCHEME}OWNER/NAME@REVISION"
        )
    return match["name"], match["revision"]


def _check_content(path: Path, entry: Any, where: str) -> None:
    """Size and hash as the hub has them."""
    expected = entry.lfs.sha256 if entry.lfs else entry.blob_id
    if path.stat().st_size != entry.size or _hash(path, is_large=bool(entry.lfs)) != expected:
        raise CheckpointError(
            f"{where}: {path.name} arrived damaged (its hash is not the hub's); run the command"
            " again"
        )


def _hash(path: Path, *, is_large: bool) -> str:
    """What the hub calls the content of a file: sha256 of large files, git's hash of small ones."""
    size = path.stat().st_size
    digest = hashlib.sha256() if is_large else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
