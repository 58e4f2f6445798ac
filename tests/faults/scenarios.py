"""What the tests of faults run: every way to write, on runs so small that it takes a moment."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from disk import copy, same_files
from runs import Run, store_content, write_run

import relexkit
from relexkit import Gram, Recorder, RelexkitError, TrajectoryStore, import_checkpoints
from relexkit.assess.jump_decision import Decision, Jumps, RewardTest
from relexkit.cli import main
from relexkit.errors import StoreError
from relexkit.gram_matrix.jumps import attempts
from relexkit.record import jumping as record_jumping
from relexkit.record.jumping import Jumper

SHAPES = {"model.embed_tokens.weight": (30, 4), "model.norm.weight": (5,)}
STEPS = [1, 2, 4]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, and the one line that it said of an error."""

    status: int
    said: str


@dataclass(frozen=True)
class Scenario:
    """A command on a folder.

    Attributes:
        prepare: makes what the command finds, in an empty folder.
        run: the command, on that folder.
        result: what it leaves, comparable.
        store: name of the store that it writes, if it writes one.
        outputs: names that are whole or absent.
        goes_on: the command may end well although an operation failed, as what failed is not asked
            for.
        goes_back: run again it begins at its last saved state, and records steps after it anew.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], Outcome]
    result: Callable[[Path], Any]
    store: str | None = None
    outputs: tuple[str, ...] = ()
    goes_on: bool = False
    goes_back: bool = False


def command(*words: str) -> Callable[[Path], Outcome]:
    """``relexkit`` with these words, ``@name`` for a path in the folder."""

    def run(folder: Path) -> Outcome:
        given = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(given)
        return Outcome(status, "\n".join(x for x in err.getvalue().splitlines() if said(x)))

    return run


def said(line: str) -> bool:
    """A line about an error, not about progress."""
    return line.startswith("relexkit: ") or "Traceback" in line or "Error" in line


def small_run(folder: Path, dtype: str, steps: list[int]) -> Run:
    moves = {"motion": "drift", "density": 1.0} if dtype == "float32" else {"density": 0.08}
    return write_run(
        folder, steps=steps, shapes=SHAPES, dtype=dtype, extras=False, buffers=True, **moves
    )


def importing(dtype: str, encoding: str, *, begun: int = 0) -> Scenario:
    """``relexkit import``, of the steps after the first ``begun`` ones."""

    def prepare(folder: Path) -> None:
        run = small_run(folder, dtype, STEPS)
        if begun:
            import_checkpoints(
                run.source,
                folder / "s.zarr",
                base=run.base,
                encoding=encoding,  # type: ignore[arg-type]
                steps=f":{STEPS[begun - 1]}",
            )

    words = ("import", "@run", "-o", "@s.zarr", "--base", "@base", "--encoding", encoding)
    return Scenario(prepare, command(*words), content_of("s.zarr"), store="s.zarr")


def content_of(name: str) -> Callable[[Path], Any]:
    return lambda folder: store_content(folder / name)


class _Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(7, 3).to(dtype))

    def train_step(self, step: int) -> None:
        random = torch.Generator().manual_seed(step)
        with torch.no_grad():
            change = torch.randn(7, 3, generator=random) * (torch.arange(3) != step % 3)
            self.weight += (0.05 * change).to(self.weight.dtype)


def recording(dtype: torch.dtype) -> Scenario:
    """A training that records, resumes after whatever the store holds, and records on."""

    def run(folder: Path) -> Outcome:
        model, path = _Model(dtype), folder / "s.zarr"
        last = (recorded(path) or [0])[-1] if recorded(path) is not None else None
        for step in range(1, (last or 0) + 1):
            model.train_step(step)
        try:
            with Recorder(model, path, resume_from=last, encoding="exact") as recorder:
                for step in range((last or 0) + 1, 5):
                    model.train_step(step)
                    recorder.record(step, {"reward": float(step)})
        except (RelexkitError, OSError) as error:
            return Outcome(1, " ".join(str(error).split()))
        return Outcome(0, "")

    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    return Scenario(prepare, run, content_of("s.zarr"), store="s.zarr")


def watching(dtype: str) -> Scenario:
    """``relexkit watch --delete-after`` over checkpoints that are there."""

    def prepare(folder: Path) -> None:
        for checkpoint in small_run(folder, dtype, STEPS).folders.values():
            (checkpoint / "STABLE").touch()  # need not be looked at twice

    words = ("watch", "@run", "-o", "@s.zarr", "--base", "@base", "--delete-after")
    options = ("--poll", "0.001", "--idle", "0.002")
    if dtype == "float32":
        options += ("--encoding", "float")

    def result(folder: Path) -> Any:
        return store_content(folder / "s.zarr"), sorted(p.name for p in (folder / "run").iterdir())

    return Scenario(prepare, command(*words, *options), result, store="s.zarr")


def of_store(*words: str, dtype: str = "bfloat16", outputs: tuple[str, ...] = ()) -> Scenario:
    """A command on a finished store."""

    def prepare(folder: Path) -> None:
        run = small_run(folder, dtype, [1, 2, 4, 5])
        import_checkpoints(run.source, folder / "s.zarr", base=run.base)

    def result(folder: Path) -> Any:
        if outputs:
            return [tree(folder / name) for name in outputs]
        found = relexkit.gram(TrajectoryStore(folder / "s.zarr"))
        return found.steps.tolist(), found.matrices.tobytes(), store_content(folder / "s.zarr")

    return Scenario(prepare, command(*words), result, store="s.zarr", outputs=outputs)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def training(**options: Any) -> Scenario:
    """``relexkit train``, two steps with their states unless ``options`` say otherwise."""

    def prepare(folder: Path) -> None:
        from tiny_models import save_tiny_model

        from relexkit.trainer.config import GRPOConfig, dump_config

        config = GRPOConfig(
            model=str(save_tiny_model(folder / "base")),
            output=str(folder / "t"),
            task={"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make"},
            num_generations=4,
            max_completion_length=3,
            device="cpu",
            **{"max_steps": 2, "save_steps": 1, "generation_batch_size": 8, **options},
        )
        (folder / "config.yaml").write_text(dump_config(config))

    def result(folder: Path) -> Any:
        from relexkit.trainer.loop.rollout_log import read_rollouts

        store = {k: v for k, v in store_content(folder / "t/run.zarr").items() if "live" not in k}
        final = (folder / "t/final/model.safetensors").read_bytes()
        return store, final, read_rollouts(folder / "t/rollouts").to_pylist()

    return Scenario(prepare, command("train", "@config.yaml"), result, store="t/run.zarr")


def jumping() -> Scenario:
    """``relexkit train`` with two jumps, of which one stays and one is taken back; a moment passes
    before and after every part of them, so that a kill at random falls there.
    """
    plain = training(
        max_steps=36,
        save_steps=5,
        generation_batch_size=16,
        learning_rate=1e-3,
        jumps={"every": 12},
    )

    def run(folder: Path) -> Outcome:
        with forced_jumps(pause=0.1):
            return plain.run(folder)

    def result(folder: Path) -> Any:
        from test_train import logged

        from relexkit.trainer.loop.state import last_state

        made = attempts(TrajectoryStore(folder / "t/run.zarr"))
        assert [attempt.outcome for attempt in made] == ["kept", "taken back"]
        last = last_state(folder / "t/state")
        state = torch.load(folder / f"t/state/step-{last}/process-0.pt", weights_only=True)
        tensors = {
            (kind, name, key): value.numpy().tobytes()
            for kind in ("model", "optimizer")
            for name, values in state[kind].items()
            for key, value in (values.items() if kind == "optimizer" else [("", values)])
        }
        return plain.result(folder), last, tensors, logged(folder / "t")

    return Scenario(plain.prepare, run, result, store="t/run.zarr", goes_back=True)


def trl_jumping() -> Scenario:
    """The same in a TRL run, which begins at the last checkpoint that its trainer completed."""

    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def run(folder: Path) -> Outcome:
        from test_trl_jumps import trl_trainer

        from relexkit.record.callback import RecorderCallback

        saved = trl_checkpoints(folder)
        if not saved:  # the callback refuses to record from the start over recorded steps
            shutil.rmtree(folder / "s.zarr", ignore_errors=True)
        with forced_jumps(pause=0.1):
            trainer = trl_trainer(folder / "trl", max_steps=27, save_steps=4, logging_strategy="no")
            callback = RecorderCallback(folder / "s.zarr", jumps=Jumps(every=12), trainer=trainer)
            trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
        return Outcome(0, "")

    def result(folder: Path) -> Any:
        from safetensors.numpy import load_file

        made = attempts(TrajectoryStore(folder / "s.zarr"))
        assert [attempt.outcome for attempt in made] == ["kept", "taken back"]
        last = trl_checkpoints(folder)[-1]
        optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
        moments = {
            (index, key): value.numpy().tobytes()
            for index, values in optimizer.items()
            for key, value in values.items()
        }
        weights = load_file(last / "model.safetensors")
        final = {name: tensor.tobytes() for name, tensor in weights.items()}
        return store_content(folder / "s.zarr"), last.name, moments, final

    return Scenario(prepare, run, result, store="s.zarr", goes_back=True)


def trl_checkpoints(folder: Path) -> list[Path]:
    """Those that were completed, in order: the trainer's state comes last."""

    def whole(checkpoint: Path) -> bool:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return True

    found = filter(whole, (folder / "trl").glob("checkpoint-*"))
    return sorted(found, key=lambda checkpoint: int(checkpoint.name.partition("-")[2]))


@contextlib.contextmanager
def forced_jumps(pause: float) -> Iterator[None]:
    """Every question ends in a jump, by another method the second time; the first stays, later ones
    are taken back. Both follow from where the run stands.
    """
    start = 0

    def slowly(name: str) -> Any:
        real = getattr(Jumper, name)

        def method(self: Jumper, *args: Any, **options: Any) -> Any:
            nonlocal start
            if name == "_decide":
                start = self._start
            time.sleep(pause)
            found = real(self, *args, **options)
            time.sleep(pause)
            return found

        return mock.patch.object(Jumper, name, method)

    def decide(self: Jumps, segment: Gram, most: int) -> Decision:
        assert (segment.momentum is None) == (start == 0)
        return Decision(6, "drift" if start else "two-point", "forced", {"skill": 0.5})

    def verdict(before_PG: np.ndarray, after_PG: np.ndarray) -> RewardTest:
        return RewardTest(0.3, 0.1, 0.001) if start else RewardTest(0.2, 0.3, 0.9)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Jumps, "decide", decide))
        patches.enter_context(mock.patch.object(record_jumping, "reward_test", verdict))
        for name in ("_decide", "_jump", "_take_back", "_conclude"):
            patches.enter_context(slowly(name))
        yield


SCENARIOS: dict[str, Scenario] = {
    "import, sparse": importing("bfloat16", "auto"),
    "import, exact": importing("float32", "exact"),
    "import, float": importing("float32", "float"),
    "append, sparse": importing("bfloat16", "auto", begun=1),
    "append, float": importing("float32", "float", begun=2),
    "record, bfloat16": recording(torch.bfloat16),
    "record, float32": recording(torch.float32),
    "watch, sparse": watching("bfloat16"),
    "watch, float": watching("float32"),
    "gram": of_store("gram", "@s.zarr"),
    "extrapolate": of_store(
        "extrapolate", "@s.zarr", "--to", "7", "9", "-o", "@out", outputs=("out",)
    ),
    "checkout": of_store("checkout", "@s.zarr", "--step", "4", "-o", "@out", outputs=("out",)),
    "train": training(),
    "round": of_store(
        "round",
        "@run/checkpoint-4",
        "--dtype",
        "bfloat16",
        "-o",
        "@out",
        dtype="float32",
        outputs=("out",),
    ),
}


LONG: dict[str, Scenario] = {"train, jumps": jumping(), "TRL, jumps": trl_jumping()}
"""Those that take too long to try every operation of."""


def recorded(path: Path) -> list[int] | None:
    """The steps of a store that verifies; None if there is no finished one."""
    try:
        store = TrajectoryStore(path)
    except StoreError as error:
        words = ("no such store", "is not a trajectory store", "its creation was interrupted")
        if any(word in str(error) for word in words):
            return None
        raise
    store.verify()
    return [int(step) for step in store.steps]


@dataclass(frozen=True)
class Undisturbed:
    """A scenario with what it needs and what it gives.

    Attributes:
        before: the folder before the command.
        work: where it runs, always the same, since stores say where they come from.
        expected: what an undisturbed run leaves.
        checksums: of its store, by step.
    """

    scenario: Scenario
    before: Path
    work: Path
    expected: Any
    checksums: dict[int, bytes]

    @classmethod
    def of(cls, scenario: Scenario, place: Path) -> Undisturbed:
        before, work = place / "before", place / "work"
        work.mkdir(parents=True)
        scenario.prepare(work)
        copy(work, before)
        outcome = scenario.run(work)
        assert outcome == Outcome(0, ""), outcome
        return cls(scenario, before, work, scenario.result(work), sums_of(scenario, work))

    def fresh(self) -> Path:
        """The folder as it was before the command."""
        return copy(self.before, self.work)

    def check_left(self, outcome: Outcome) -> list[int]:
        """What a command that failed has left is whole, and what it said is true; the steps that
        are recorded.
        """
        steps = self.check_whole()
        if outcome.status:
            assert outcome.status == 1
            assert len(outcome.said.splitlines()) == 1, outcome.said
            assert "Traceback" not in outcome.said
        told = re.search(r"the (\d+) recorded steps are intact", outcome.said)
        assert told is None or int(told[1]) == len(steps), (outcome.said, steps)
        left = [p for p in self.work.rglob("*") if p.name.endswith((".partial", ".lock"))]
        store = self.work / (self.scenario.store or "")
        outside = [p for p in left if store not in p.parents]
        assert not outside, f"left behind: {outside}"
        return steps

    def check_whole(self) -> list[int]:
        """Whatever happened: the store holds whole steps only, the outputs and the originals are
        whole or not there, and no original is gone without its step; the steps that are recorded.
        """
        steps: list[int] = []
        if self.scenario.store is not None:
            found = recorded(self.work / self.scenario.store)
            steps = found or []
            assert steps == list(self.checksums)[: len(steps)]
            sums = sums_of(self.scenario, self.work) if found is not None else {}
            assert all(self.checksums[step] == sums[step] for step in steps)
            if (self.work / "run").is_dir():
                self._check_originals(steps)
        for name, whole in zip(self.scenario.outputs, self.expected, strict=False):
            shown = [p for p in tree(self.work / name) if not p.startswith(".")]
            tops = {Path(p).parts[0] for p in shown if len(Path(p).parts) > 1}
            expected = {p for p in whole if Path(p).parts[0] in tops or len(Path(p).parts) == 1}
            assert not shown or {*shown} == expected, f"{name} holds a part: {shown}"
        return steps

    def _check_originals(self, steps: list[int]) -> None:
        """A checkpoint is where it was, whole, or its step is recorded."""
        for checkpoint in (self.before / "run").iterdir():
            here = self.work / "run" / checkpoint.name
            step = int(checkpoint.name.partition("-")[2])
            assert step in steps or not same_files(checkpoint, here), f"{checkpoint.name} is lost"
            assert not here.exists() or not same_files(checkpoint, here), f"half of {here.name}"

    def check_completed(self) -> None:
        """The same command completes it, to what an undisturbed run leaves."""
        outcome = self.scenario.run(self.work)
        assert outcome.status == 0, outcome
        assert self.scenario.result(self.work) == self.expected
        left = [p for p in self.work.rglob("*") if p.name.endswith(".partial")]
        assert not left, left


def sums_of(scenario: Scenario, folder: Path) -> dict[int, bytes]:
    if scenario.store is None or recorded(folder / scenario.store) is None:
        return {}
    store = TrajectoryStore(folder / scenario.store)
    return {
        int(step): np.asarray(row).tobytes()
        for step, row in zip(store.steps, store.checksums(), strict=True)
    }
