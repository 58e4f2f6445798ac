"""Further predictors that are weights over the recorded deltas, against those of the table, in the
weights of the study's runs (docs/jumps.md).

    python docs/study/predictors.py

Every stretch of 25 steps of plain training (from 0, 25, 50 and 100) predicts 6, 12 and 25 steps
later. Printed is the skill against hold, its mean over stretches and seeds. From the Gram matrices
in docs/study/results alone, of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from arms import RATES, rate_name
from kept_gram import as_gram, load_gram

from relexkit import Prediction, predict_weights
from relexkit.assess.jump_decision import momentum_of
from relexkit.gram_matrix import Gram

RESULTS = Path(__file__).parent / "results"
TRAINED, LATER = 25, (6, 12, 25)
STARTS = (0, 25, 50, 100)
RIDGE = 1e-3
Predictor = Callable[[Gram, float], np.ndarray]
"""Gram matrix of T steps and a target -> weights ``[T]`` over their deltas."""


def named(method: str, momentum_known: bool = False) -> Predictor:
    """A method of ``relexkit extrapolate``; with the momentum of the run's first steps, as after a
    jump, or fitted to the stretch alone.
    """

    def predict(gram: Gram, target: float) -> np.ndarray:
        given = gram if momentum_known else replace(gram, momentum=None)
        return predict_weights(given, [target], Prediction(method=method))[0, 0]

    return predict


def unit(gram: Gram, row: int) -> np.ndarray:
    """The weights that are the delta of one step."""
    return np.eye(len(gram.steps))[row]


def damped(method: str, share: float) -> Predictor:
    """Only a share of the way from the last step to what a method predicts."""

    def predict(gram: Gram, target: float) -> np.ndarray:
        held = unit(gram, -1)
        return held + share * (named(method)(gram, target) - held)

    return predict


def exponential_average(memory: float) -> Predictor:
    """The average of checkpoints with weights that fall by ``memory`` each step back."""

    def predict(gram: Gram, target: float) -> np.ndarray:
        weights = memory ** np.arange(len(gram.steps))[::-1]
        return weights / weights.sum()

    return predict


def one_minus_sqrt(gram: Gram, target: float) -> np.ndarray:
    """The average that a learning rate decaying as 1 - sqrt(t/T) would have led to, approximately:
    every update weighted by the rate at its place.
    """
    count = len(gram.steps)
    rates = 1 - np.sqrt(np.arange(count) / count)
    return rates - np.append(rates[1:], 0)


def dynamic_modes(rank: int, order: int = 1) -> Predictor:
    """Dynamic mode decomposition: the coefficients of the first directions step on by the linear
    map, of ``order`` steps back and a constant, that fits them best.
    """

    def predict(gram: Gram, target: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(gram.matrices[0])
        kept = np.argsort(values)[::-1][:rank]
        scale = np.sqrt(values[kept])
        path_TR = vectors[:, kept] * scale
        lagged = np.hstack(
            [path_TR[order - 1 - lag : len(path_TR) - 1 - lag] for lag in range(order)]
        )
        past = np.hstack([lagged, np.ones((len(lagged), 1))])
        step = np.linalg.lstsq(past, path_TR[order:], rcond=1e-6)[0]
        recent = [path_TR[-1 - lag] for lag in range(order)]
        for _ in range(round(target - gram.steps[-1])):
            recent = [np.concatenate([*recent, [1.0]]) @ step, *recent[:-1]]
        return vectors[:, kept] @ (recent[0] / scale)

    return predict


def anderson(memory: int, regularisation: float) -> Predictor:
    """Regularised Anderson acceleration: the combination of the latest steps, summing to one, whose
    update is smallest.
    """

    def predict(gram: Gram, target: float) -> np.ndarray:
        count = len(gram.steps)
        difference = np.eye(count) - np.eye(count, k=-1)
        updates = difference @ gram.matrices[0] @ difference.T
        chosen = updates[-memory:, -memory:]
        chosen = chosen / np.linalg.norm(chosen, 2) + regularisation * np.eye(memory)
        solved = np.linalg.solve(chosen, np.ones(memory))
        weights = np.zeros(count)
        weights[-memory:] = solved / solved.sum()
        return weights

    return predict


def learned(others: list[Gram]) -> Predictor:
    """What later coefficients of the first direction are, in units of the last one, as a ridge
    regression on the earlier ones learned from stretches of other runs; the last step moves by the
    difference along that direction. After NExt (arXiv 2604.11446), whose network learns from
    adapters' factors.
    """
    paths = [along_first(gram, TRAINED)[1] for gram in others]
    inputs = np.array([path[:TRAINED] / path[TRAINED - 1] for path in paths])
    center = inputs.mean(axis=0)
    spread = inputs - center
    inner = spread.T @ spread + RIDGE * len(paths) * np.eye(TRAINED)
    shares = np.linalg.solve(inner, spread.T)

    def predict(gram: Gram, target: float) -> np.ndarray:
        direction, path = along_first(gram, TRAINED)
        answers = np.array([p[round(target) - 1] / p[TRAINED - 1] for p in paths])
        reached = answers.mean() + (path / path[-1] - center) @ shares @ answers
        return unit(gram, -1) + (reached - 1) * path[-1] * direction

    return predict


def along_first(gram: Gram, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first direction of so many steps as weights over them, of length one and towards the
    last, and the coefficients of all steps along it.
    """
    matrix = gram.matrices[0]
    values, vectors = np.linalg.eigh(matrix[:count, :count])
    direction = vectors[:, -1] / np.sqrt(values[-1])
    path = matrix[:, :count] @ direction
    return direction * np.sign(path[count - 1]), path * np.sign(path[count - 1])


PREDICTORS: dict[str, Predictor] = {
    **{name: named(name) for name in ("relex", "two-point", "least-squares", "drift", "model")},
    "drift, momentum known": named("drift", momentum_known=True),
    "relex, half the way": damped("relex", 0.5),
    "two-point, half the way": damped("two-point", 0.5),
    "exponential average, 0.9": exponential_average(0.9),
    "1 - sqrt average": one_minus_sqrt,
    "dynamic modes, rank 1": dynamic_modes(1),
    "dynamic modes, rank 3": dynamic_modes(3),
    "autoregression, rank 1, 2 steps": dynamic_modes(1, 2),
    "Anderson, 10 steps, 0.01": anderson(10, 1e-2),
    "Anderson, 10 steps, 1": anderson(10, 1.0),
}


LEARNED = "learned from other seeds, rank 1"


def stretches(rate: float) -> list[tuple[str, Gram]]:
    """Every stretch of 50 steps of the plain runs, relative to where it begins, and whose it is;
    all but the first with the momentum that the first one shows.
    """
    found = []
    for path in sorted((RESULTS / f"plain-{rate_name(rate)}").glob("seed-*-gram.npz")):
        kept, _ = load_gram(path)
        steps, count = kept.steps, len(kept.steps)
        whole = np.pad(kept.matrices[0], (1, 0))  # the base, step 0
        momentum = None
        for start in STARTS:
            rows = np.arange(start + 1, start + TRAINED + max(LATER) + 1)
            if rows[-1] > count or steps[rows[-1] - 1] != rows[-1]:
                continue
            part = whole[np.ix_(rows, rows)] - whole[rows, start][:, None] - whole[start, rows]
            part += whole[start, start]
            gram = as_gram(rows - start, part, int(kept.num_parameters[0]))
            found.append((path.name, replace(gram, momentum=momentum)))
            momentum = momentum or momentum_of(gram.until(TRAINED))
    return found


def skill(gram: Gram, predict: Predictor, later: int) -> float:
    """1 - squared error / that of hold."""
    matrix, target = gram.matrices[0], TRAINED + later
    weights = predict(gram.until(TRAINED), float(target))
    held = unit(gram.until(TRAINED), -1)

    def error(chosen: np.ndarray) -> float:
        difference = np.append(chosen, np.zeros(len(matrix) - TRAINED))
        difference[target - 1] -= 1
        return float(difference @ matrix @ difference)

    return 1 - error(weights) / error(held)


def main() -> None:
    rates = [rate for rate in RATES if stretches(rate)]
    runs = {rate: stretches(rate) for rate in rates}
    heads = [f"{rate_name(rate)}, +{later}" for rate in rates for later in LATER]
    print("| predictor | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    everything = [run for rate in rates for run in runs[rate]]
    from_others = {
        seed: learned([gram for other, gram in everything if other != seed])
        for seed in {seed for seed, _ in everything}
    }
    for name in (*PREDICTORS, LEARNED):
        means = [
            np.mean(
                [
                    skill(gram, PREDICTORS.get(name, from_others[seed]), later)
                    for seed, gram in runs[rate]
                ]
            )
            for rate in rates
            for later in LATER
        ]
        cells = [f"{mean:+.2f}" if mean > -10 else "below -10" for mean in means]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(", ".join(f"{rate_name(r)}: {len(runs[r])} stretches" for r in rates))


if __name__ == "__main__":
    main()
