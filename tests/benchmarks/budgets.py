"""The budgets of the project beside what ``run.py`` has measured: one table, met or not met.

Ratios are taken within each repeat; the figure is their median. A budget that the parts which ran
say nothing about is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Budget:
    """One budget and the figures that it is held against.

    Attributes:
        limit: what the median may be at most.
        values: one for each repeat; of peaks and errors one for each size or pair, and the largest
            counts.
        unit: printed behind them.
        worst: whether the largest value counts instead of the median.
    """

    what: str
    limit: float
    values: list[float]
    unit: str = ""
    worst: bool = False

    @property
    def figure(self) -> float:
        """What is compared with the limit."""
        return max(self.values) if self.worst else statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the budget holds."""
        return self.figure <= self.limit

    def cells(self) -> list[str]:
        """A row of the table."""
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        return [
            self.what,
            f"{self.limit:.3g}{self.unit}",
            f"{self.figure:.3g}{self.unit}",
            spread if len(self.values) > 1 else "-",
            "met" if self.met else "not met",
        ]


HEADINGS = ["", "at most", "figure", "spread", ""]


def budgets(results: Mapping[str, Any]) -> list[Budget]:
    """Those that the measured parts of ``results`` speak of."""
    return [b for part, of in _PARTS.items() if part in results for b in of(results[part])]


def _pipeline(result: Mapping[str, Any]) -> Iterator[Budget]:
    rounds = result.get("bfloat16")
    if rounds is None:
        return
    ours = [one["all"]["wall_seconds"] for one in rounds["relexkit"]]
    copies = [one["all"]["wall_seconds"] for one in rounds["copied"]]
    ratios = [o / c for o, c in zip(ours, copies, strict=True)]
    yield Budget("import + Gram + one checkpoint, over `cp -r`", 1.0, ratios)
    theirs = [one["all"]["wall_seconds"] for one in rounds["released"]]
    if theirs:
        shares = [o / t for o, t in zip(ours, theirs, strict=True)]
        yield Budget("the same, over the released scripts", 1 / 12, shares)
    disk = rounds["disk"]
    yield Budget(
        "steps on disk, over the checkpoints", 1 / 150, [disk["steps"] / disk["checkpoints"]]
    )


def _questions(result: Mapping[str, Any]) -> Iterator[Budget]:
    seconds = [max(s) for s in result["inside"]["seconds"].values()]
    yield Budget("a further question inside a process", 1.0, seconds, " s", worst=True)
    asked = [c["wall_seconds"] for costs in result["commands"].values() for c in costs]
    yield Budget("a further question as a command", 1.0, asked, " s", worst=True)


def _targets(result: Mapping[str, Any]) -> Iterator[Budget]:
    for source, found in result.items():
        pairs = zip(found["further_target_seconds"], found["write_seconds"], strict=True)
        ratios = [more / writing for more, writing in pairs]
        yield Budget(f"a further target, over writing its bytes ({source})", 1.5, ratios)


def _parallel(result: Mapping[str, Any]) -> Iterator[Budget]:
    for way in ("two threads", "two processes"):
        for work, found in result.items():
            pairs = zip(found["one"], found[way], strict=True)
            ratios = [both["seconds"] / one["seconds"] for one, both in pairs]
            yield Budget(f"{work} by {way}, over one", 1 / 1.7, ratios)


def _agreement(result: Mapping[str, Any]) -> Iterator[Budget]:
    yield Budget(
        "relative error of the predicted delta",
        1e-3,
        [p["global"] for p in result.values()],
        worst=True,
    )


def _memory(rows: list[Mapping[str, Any]]) -> Iterator[Budget]:
    for stage in ("import", "Gram", "extrapolate"):
        peaks = [row[stage]["peak_bytes"] / MEBIBYTE for row in rows]
        yield Budget(f"peak memory of {stage}", 1024, peaks, " MiB", worst=True)


_PARTS: dict[str, Callable[[Any], Iterator[Budget]]] = {
    "pipeline": _pipeline,
    "questions": _questions,
    "targets": _targets,
    "parallel": _parallel,
    "agreement": _agreement,
    "memory": _memory,
}
