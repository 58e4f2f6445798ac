"""Compare predicted checkpoints with the released RELEX scripts' and with a float64 SVD of the
recorded deltas.

    python tests/benchmarks/agreement.py RUN --target 100 --ours LABEL=ROUNDED,FLOAT32 ...
    [--reference ROUNDED,CACHE]

RUN has ``base/`` and ``bfloat16/checkpoint-N``. ROUNDED are folders in bfloat16, rounded to
nearest; FLOAT32 the same prediction in float32; CACHE the folder where the released script keeps
each tensor's directions and coefficients, from which its prediction before rounding follows. Prints
one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

COLUMNS = 2**20


class Weights:
    """Rows of the tensors of a folder of safetensors files, flat, as float64."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._file = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            self._file.update(dict.fromkeys(file.keys(), file))

    def names(self) -> list[str]:
        return list(self._file)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self._file[name].get_slice(name)[rows].to(torch.float64).numpy().reshape(-1)

    def bits(self, name: str, rows: slice) -> np.ndarray:
        return self._file[name].get_slice(name)[rows].reshape(-1).view(torch.int16).numpy()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file[name].get_slice(name).get_shape())


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis with about ``COLUMNS`` elements each."""
    width = max(1, COLUMNS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], width):
        yield slice(start, min(start + width, shape[0]))


def line_at(values: np.ndarray, steps: np.ndarray, target: float) -> np.ndarray:
    """Least-squares lines through the columns of ``values [T, R]``, at ``target``."""
    slope, intercept = np.polyfit(steps, values, 1)
    return slope * target + intercept


def oracle_weights(
    base: Weights, run: list[Weights], name: str, steps: np.ndarray, target: float
) -> np.ndarray:
    """Rank-1 weights over the recorded deltas of a tensor, everything in float64."""
    gram = np.zeros((len(run), len(run)))
    for rows in row_blocks(base.shape(name)):
        delta = np.stack([step.rows(name, rows) for step in run]) - base.rows(name, rows)
        gram += delta @ delta.T
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros(len(run))
    singular, left = np.sqrt(values[-1]), vectors[:, -1]
    return left * (line_at((left * singular)[:, None], steps, target)[0] / singular)


class Differences:
    """Squared differences and squared lengths by tensor, for one pair."""

    def __init__(self) -> None:
        self._error: dict[str, float] = {}
        self._length: dict[str, float] = {}

    def add(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        self._error[name] = self._error.get(name, 0.0) + float(((ours - theirs) ** 2).sum())
        self._length[name] = self._length.get(name, 0.0) + float((theirs**2).sum())

    def summary(self) -> dict[str, float | str]:
        """Relative errors of the delta: over all weights, and by tensor (those that moved)."""
        by_tensor = {
            n: (self._error[n] / self._length[n]) ** 0.5 for n in self._error if self._length[n] > 0
        }
        worst = max(by_tensor, key=lambda n: by_tensor[n])
        return {
            "global": (sum(self._error.values()) / sum(self._length.values())) ** 0.5,
            "median": float(np.median(list(by_tensor.values()))),
            "worst": by_tensor[worst],
            "worst_tensor": worst,
        }


def compare(
    run: Path,
    ours: dict[str, tuple[Path, Path]],
    reference: tuple[Path, Path] | None,
    target: float,
) -> dict[str, dict[str, float | str]]:
    """Relative errors of predicted deltas for every pair, and the share of equal bfloat16
    weights.
    """
    folders = sorted((run / "bfloat16").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    steps = np.array([int(p.name.rpartition("-")[2]) for p in folders], np.float64)
    pairs: dict[str, Differences] = {}
    same: dict[str, list[int]] = {}
    with ExitStack() as stack:
        base = Weights(run / "base", stack)
        recorded = [Weights(folder, stack) for folder in folders]
        rounded = {label: Weights(paths[0], stack) for label, paths in ours.items()}
        precise = {label: Weights(paths[1], stack) for label, paths in ours.items()}
        released = Weights(reference[0], stack) if reference else None
        for name in base.names():
            if name == "lm_head.weight" and "model.embed_tokens.weight" in base.names():
                continue  # tied in every model that has both and is measured here
            a = oracle_weights(base, recorded, name, steps, target)
            direction = _direction(reference[1], name, steps, target) if reference else None
            first = 0
            for rows in row_blocks(base.shape(name)):
                origin = base.rows(name, rows)
                oracle = a @ (np.stack([step.rows(name, rows) for step in recorded]) - origin)
                deltas = {
                    f"{label}, float32": folder.rows(name, rows) - origin
                    for label, folder in precise.items()
                }
                if direction is not None:
                    theirs = direction[first : first + len(origin)]
                    pairs.setdefault(
                        "released scripts, before rounding | float64 SVD", Differences()
                    ).add(name, theirs, oracle)
                for label, delta in deltas.items():
                    pairs.setdefault(f"{label} | float64 SVD", Differences()).add(
                        name, delta, oracle
                    )
                    if direction is not None:
                        against = f"{label} | released scripts, before rounding"
                        pairs.setdefault(against, Differences()).add(name, delta, theirs)
                first += len(origin)
                if released is None:
                    continue
                for label, folder in rounded.items():
                    key = f"{label}, bfloat16 | released scripts, bfloat16"
                    delta, theirs_rounded = (
                        folder.rows(name, rows) - origin,
                        released.rows(name, rows) - origin,
                    )
                    pairs.setdefault(key, Differences()).add(name, delta, theirs_rounded)
                    equal = folder.bits(name, rows) == released.bits(name, rows)
                    counts = same.setdefault(key, [0, 0])
                    counts[0] += int(equal.sum())
                    counts[1] += equal.size
    result = {pair: differences.summary() for pair, differences in pairs.items()}
    for key, (equal_count, total) in same.items():
        result[key]["equal_weights"] = equal_count / total
    return result


def _direction(cache: Path, name: str, steps: np.ndarray, target: float) -> np.ndarray:
    """The released script's predicted delta before rounding: its first direction times its
    continued coefficient.
    """
    with np.load(cache / f"{name.replace('.', '_')}.npz") as kept:
        # It fits against row numbers and counts the target from the last row.
        ahead = len(steps) - 1 + target - steps[-1]
        coefficient = line_at(
            kept["C"].astype(np.float64), np.arange(len(steps), dtype=np.float64), ahead
        )
        return kept["V_r"].astype(np.float64) @ coefficient


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predicted checkpoints.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--ours", nargs="+", required=True, metavar="LABEL=ROUNDED,FLOAT32")
    parser.add_argument("--reference", metavar="ROUNDED,CACHE")
    given = parser.parse_args()
    ours = {}
    for item in given.ours:
        label, _, paths = item.partition("=")
        rounded, _, precise = paths.partition(",")
        ours[label] = (Path(rounded), Path(precise))
    reference = None
    if given.reference:
        released, _, cache = given.reference.partition(",")
        reference = (Path(released), Path(cache))
    print(json.dumps(compare(given.run, ours, reference, given.target)))


if __name__ == "__main__":
    main()
