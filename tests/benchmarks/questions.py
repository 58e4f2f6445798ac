"""Seconds for further questions, in one process, with every way of reading weights cut off.

    python tests/benchmarks/questions.py [STORE] [--tensors 400] [--steps 75]

prints one JSON document. Gram matrices are made up; STORE, if given, is a store whose Gram matrices
are known, and the spectrum command then has to answer from it without touching deltas or base.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from relexkit import METHODS, Gram, Options, Prediction, TrajectoryStore, predict_weights, spectrum
from relexkit.cli import main as relexkit
from relexkit.errors import ExtrapolationError

READERS = (
    "read_base",
    "indptr",
    "read_update",
    "read_log",
    "entries",
    "read_row",
    "read_delta",
    "read_state",
)
DIMENSIONS = 200


def made_up_gram(num_tensors: int, num_steps: int, seed: int) -> Gram:
    """Gram matrices of trajectories with some drift, some swing and much noise, for a model of 400
    tensors or so.
    """
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 4, num_steps)).astype(np.int64)
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    names = tuple(
        f"model.layers.{i // len(kinds)}.{kinds[i % len(kinds)]}.weight" for i in range(num_tensors)
    )
    matrices = np.empty((num_tensors, num_steps, num_steps))
    for matrix in matrices:
        walk = np.cumsum(rng.standard_normal((num_steps, DIMENSIONS)), axis=0)
        line = np.outer(steps, rng.standard_normal(DIMENSIONS))
        swing = np.outer(
            np.sin(steps * rng.uniform(0.03, 0.2)), 10 * rng.standard_normal(DIMENSIONS)
        )
        delta = walk + 0.3 * line + swing
        matrix[:] = delta @ delta.T
    counts = rng.integers(0, 1000, (num_tensors, num_steps))
    return Gram(
        steps,
        names,
        np.full(num_tensors, 10**6, np.int64),
        matrices,
        counts,
        counts.cumsum(axis=1),
        counts // 2,
    )


def asked(observed: Gram) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Every method, and RELEX with every option that changes the work: ``(name, target,
    arguments)``.
    """
    future = 5.0 * float(observed.steps[-1])
    recorded = float(observed.steps[len(observed.steps) // 2])
    for method in METHODS:
        yield method, recorded if method == "reconstruct" else future, Prediction(method=method)
    for label, options in (
        ("rank 5", Options(rank=5)),
        ("polynomial", Options(fit="polynomial")),
        ("sinusoid", Options(fit="sinusoid")),
        ("window 20", Options(window=20)),
        ("refit every 10", Options(refit_every=10)),
        ("row axis", Options(axis="row")),
    ):
        yield f"relex, {label}", future, Prediction(options=options)
    for scope in ("layer", "module", "global"):
        yield f"relex, {scope} scope", future, Prediction(scope=scope)


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Inside, any attempt to read deltas or base weights from a store fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a further question read weights from the store")

    kept = {name: getattr(TrajectoryStore, name) for name in READERS}
    try:
        for name in READERS:
            setattr(TrajectoryStore, name, refuse)
        yield
    finally:
        for name, method in kept.items():
            setattr(TrajectoryStore, name, method)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time further questions in one process.")
    parser.add_argument("store", nargs="?")
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    observed = made_up_gram(given.tensors, given.steps, given.seed)
    cut = int(observed.steps[given.steps * 2 // 3])
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    with no_weights():
        for name, target, arguments in asked(observed):
            began = time.perf_counter()
            try:
                weights = predict_weights(observed, [target], arguments)
            except (
                ExtrapolationError
            ) as error:  # a curve that does not converge is an answer too; it is reported as such
                failed[f"predict: {name}"] = str(error)
            else:
                assert np.isfinite(weights).all(), name
            seconds[f"predict: {name}"] = time.perf_counter() - began
        for scope in ("tensor", "layer", "module", "global"):
            for centered in (False, True):
                began = time.perf_counter()
                spectrum(observed, scope=scope, until=cut, centered=centered)
                about = "centered" if centered else "uncentered"
                seconds[f"spectrum: {scope}, {about}, until {cut}"] = time.perf_counter() - began
        if given.store:
            last = int(TrajectoryStore(given.store).steps[-1])
            for scope in ("tensor", "layer", "module", "global"):
                command = [
                    "spectrum",
                    given.store,
                    "--scope",
                    scope,
                    "--until",
                    str(max(1, last // 2)),
                    "--centered",
                    "--json",
                ]
                began = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    status = relexkit(command)
                seconds[f"command: {' '.join(command[2:])}"] = time.perf_counter() - began
                assert status == 0, command
    sizes = {"tensors": given.tensors, "steps": given.steps}
    print(json.dumps({**sizes, "weights_read": False, "seconds": seconds, "failed": failed}))


if __name__ == "__main__":
    main()
