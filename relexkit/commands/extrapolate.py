"""``relexkit extrapolate``: the predicted checkpoints of future steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from relexkit.commands.console import print_json, say, show
from relexkit.commands.observer import Observer, OfGram, observer
from relexkit.commands.sync import Sync
from relexkit.errors import RelexkitError
from relexkit.materialize import Output
from relexkit.options import group, option
from relexkit.predict.prediction import Prediction

if TYPE_CHECKING:
    from relexkit.store import TrajectoryStore


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RelexkitError(
            f"--adapter {text!r} is not a rank; expected a whole number from 1 upwards, or nothing"
        )
    return int(text)


def _step(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RelexkitError(
            f"--to {text!r} is not a number; expected an optimizer step such as 500"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Options(OfGram):
    """Options of ``relexkit extrapolate``."""

    to: tuple[float, ...] = option(type=_step, metavar="STEP")
    """target steps"""
    out: str = option("-o", "--out", metavar="OUT")
    """folder for OUT/step-STEP/"""
    prediction: Prediction = group(Prediction, heading="prediction")
    output: Output = group(Output, "dtype", "rounding", "seed", heading="output")
    adapter: int | None = option(default=None, type=_rank, nargs="?", const=0, metavar="RANK")
    """from a store of PEFT adapters: write an adapter, of this rank or one that fits"""
    sync: Sync = group(Sync)
    push: str | None = option(default=None, metavar="ORG/NAME")
    """also upload it to the hub; several targets to ORG/NAME-step-STEP"""


def run(options: Options) -> None:
    """Write a folder for each target."""
    from relexkit.materialize import extrapolate
    from relexkit.predict.asked import less_than_asked, steps_used
    from relexkit.predict.extrapolators import step_text
    from relexkit.store import TrajectoryStore

    prediction = options.prediction
    sync = options.sync.chosen(adapter=options.adapter is not None)
    output = replace(options.output, adapter=options.adapter, sync=sync)
    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        compute = observed.decided(store, prediction.until)
        written = extrapolate(
            store, options.to, options.out, prediction, output=output, compute=compute
        )
        _warn(observed, store, prediction, options.to)
    if observed.silent:
        return
    if options.push is not None:
        from relexkit.materialize.sharing import push

        for w in written:
            several = f"-step-{step_text(w.target)}" if len(written) > 1 else ""
            say(f"pushed to {push(w.folder, options.push + several)}")
    for line in less_than_asked(store, [prediction], options.to):
        say(line)
    first, last = steps_used(store, prediction)[[0, -1]].tolist()
    if options.json:
        how = {"method": prediction.method, "steps": [first, last]}
        told = [{k: v for k, v in asdict(w).items() if v is not None} for w in written]
        print_json([one | {"folder": str(one["folder"]), **how} for one in told])
        return
    for w in written:
        rank = "" if w.rank is None else f", rank {w.rank}, relative error {w.error:.1e}"
        show(
            f"step {step_text(w.target)}: {w.folder}, {prediction.method} from steps {first} to"
            f" {last}{rank}" + (" (was there already)" if w.already else "")
        )


def _warn(
    observed: Observer, store: TrajectoryStore, prediction: Prediction, targets: Sequence[float]
) -> None:
    """One line if the run's own record speaks against what is asked; reads no weights beyond those
    that the prediction reads.
    """
    from relexkit.assess.advice import advise, objection
    from relexkit.gram_matrix.exact import known_steps
    from relexkit.predict.extrapolators import method_of, name_of

    if not (method_of(prediction.method).needs_gram or known_steps(store) == len(store.steps)):
        return
    until = prediction.until
    if until is not None:
        until = min(until, int(store.steps[-1]))  # the command has said so
    seen = observed.observe(store, until)
    if observed.silent:
        return
    advice = advise(seen.gram, seen.metrics, record=False)
    last_step = float(seen.gram.steps[-1])
    asked_of = store.path if until is None else f"{store.path} --until {until}"
    against = objection(advice, name_of(prediction.method), last_step, targets, asked_of)
    if against:
        say(f"warning: {against}")
