"""The k-th operation on the disk fails, for every k, over everything that writes."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from disk import Disk, watched
from scenarios import SCENARIOS, Undisturbed

SAMPLE = int(os.environ.get("RELEXKIT_FAULTS", "2"))
"""Of the operations, so many evenly spread are made to fail; 0 for every one."""

FAULTS = {
    "full once": (errno.ENOSPC, False),
    "full from there on": (errno.ENOSPC, True),
    "broken once": (errno.EIO, False),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Undisturbed] = {}

    def get(name: str) -> Undisturbed:
        if name not in made:
            place = tmp_path_factory.mktemp("undisturbed")
            made[name] = Undisturbed.of(SCENARIOS[name], place)
        return made[name]

    return get


def count_operations(known: Undisturbed) -> int:
    disk = Disk(known.fresh())
    with watched(disk):
        assert known.scenario.run(known.work).status == 0
    return disk.count


def fails_at(known: Undisturbed, number: int, error: int, stays: bool) -> None:
    disk = Disk(known.fresh(), fail_at=number, error=error, stays=stays)
    with watched(disk):
        outcome = known.scenario.run(known.work)
    if not disk.failed:  # a run of several threads may take fewer operations
        return
    try:
        known.check_left(outcome)
        known.check_completed()
    except BaseException as problem:
        problem.add_note(f"after {disk.failed[0]!r} failed, the {number}-th; said: {outcome.said}")
        raise


def check_every(known: Undisturbed, kind: str, sample: int) -> int:
    """Fail at every operation, or at ``sample`` of them; returns at how many."""
    total = count_operations(known)
    assert total > 5
    stride = max(1, total // sample) if sample else 1
    problems = []
    numbers = range(1 + len(kind) % stride, total + 1, stride)
    for number in numbers:
        try:
            fails_at(known, number, *FAULTS[kind])
        except Exception as problem:
            notes = " ".join(getattr(problem, "__notes__", ()))
            problems.append(f"{type(problem).__name__}: {problem} ({notes})"[:600])
    assert not problems, f"{len(problems)} of {len(numbers)}:\n" + "\n".join(problems)
    return len(numbers)


@pytest.mark.parametrize(
    ("name", "kind"), list(zip(SCENARIOS, itertools.cycle(FAULTS), strict=False))
)
def test_a_failed_operation_loses_nothing_and_the_same_command_goes_on(
    name: str, kind: str, undisturbed
) -> None:
    check_every(undisturbed(name), kind, 2 if name == "train" else SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_failed_operation(name: str, kind: str, undisturbed) -> None:
    print(f"{name}, {kind}: {check_every(undisturbed(name), kind, 0)} operations")
