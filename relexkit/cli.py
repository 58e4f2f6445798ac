"""The ``relexkit`` command: parse, call one function, print.

Results go to standard output (with ``--json`` one JSON document and nothing else), progress and messages to standard
error. Exit status: 0 done, 1 a stated error in one line, 2 wrong usage. Heavy modules load inside the commands.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit.commands.observe import add_pca, observer
from relexkit.console import console, number, percent, print_json, print_pairs, progress_bar, say, size_text
from relexkit.errors import RelexkitError
from relexkit.version import __version__

if TYPE_CHECKING:
    from relexkit.metrics import Informative
    from relexkit.null import WalkNull
    from relexkit.spectrum import ScopeSpectrum, Spectrum
    from relexkit.store import TrajectoryStore

COMMAND_MODULES = {
    "backtest": (
        "relexkit.commands.backtest",
        "how every method would have done in the run's own past, and how far to trust it",
    ),
    "advise": ("relexkit.commands.advise", "say what to do next with a run, and why"),
    "linearity": ("relexkit.commands.linearity", "how straight every single weight's path is, beside a walk's; one pass"),
    "report": ("analysis.report", "write one self-contained page about a run: advice, claims, figures, commands"),
    "probe": ("trainer.outputs", "how linear the log-probabilities of texts are; generate from extrapolated logits"),
    "sweep": ("trainer.sweep", "try predictions on a task, stop bad ones early, and recommend"),
    "watch": ("relexkit.commands.watch", "import checkpoints as they appear, and delete them afterwards if asked to"),
    "train": ("trainer.command", "train a model by GRPO, recording its trajectory"),
    "g2d": ("trainer.g2d", "preference pairs from a run's rollouts, DPO from its recorded steps, evaluation"),
    "tokens": ("trainer.tokens_command", "which tokens carry the update, from a log of rollouts"),
    "evaluate": ("trainer.evaluate_command", "accuracy of models on a task, with intervals: folders, or steps of a store"),
    "demo": ("trainer.demo", "train a small model, record, analyse, extrapolate: the whole story in minutes"),
    "gram": ("relexkit.commands.gram", "compute the Gram matrices and keep them in the store: the one pass"),
}
"""Commands with a module of their own: name -> (module with ``add_arguments(parser)`` and ``run(arguments)``, help)."""

_SHOWN_ROWS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = None
    try:
        if given and given[0] in COMMAND_MODULES:
            parsed = _module_parser(given[0]).parse_args(given[1:])
        else:
            parsed = _parser().parse_args(given)
        parsed.run(parsed)
    except (RelexkitError, OSError) as error:
        if parsed is not None and parsed.debug:
            raise
        if not getattr(error, "said_elsewhere", False):
            print(f"relexkit: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("relexkit: interrupted; run the same command again to go on", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, RelexkitError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return " ".join(str(error).split())


# -- commands ---------------------------------------------------------------------------------------------------------


def _import(parsed: argparse.Namespace) -> None:
    from relexkit.importer import import_checkpoints

    if parsed.dry_run:
        import_module("relexkit.commands.dry_run").print_estimate(parsed)
        return
    with progress_bar() as progress:
        result = import_checkpoints(
            parsed.source, parsed.out, base=parsed.base, steps=parsed.steps, encoding=parsed.encoding,
            mantissa_bits=parsed.mantissa_bits, source_format=parsed.format, step_map=parsed.step_map, progress=progress,
        )  # fmt: skip
    for note in result.notes:
        say(note)
    for what, reason in result.left_out.items():
        say(f"{what} left out: {reason}")
    if result.already:
        say(f"{len(result.already)} steps were recorded already")
    if "config.json" not in result.store.attributes["files"]:
        say("no config.json was found: written checkpoints will need one before they load with from_pretrained")
    _print_info(result.store, parsed.json)


def _info(parsed: argparse.Namespace) -> None:
    from relexkit.store import NotAStoreError, TrajectoryStore

    try:
        store = TrajectoryStore(parsed.store)
    except NotAStoreError:
        if not Path(parsed.store).is_dir():
            raise
        import_module("relexkit.commands.info_source").print_source(Path(parsed.store), parsed.json)
        return
    _print_info(store, parsed.json)


def _print_info(store: TrajectoryStore, as_json: bool) -> None:
    from relexkit.store import describe_steps

    sizes = store.num_bytes()
    moving = [part for part in store.layout.parts if part.encoding != "fixed"]
    bits = {"float32": 4}
    checkpoint_bytes = sum(part.numel * bits.get(part.dtype, 2) for part in moving)
    document: dict[str, Any] = {
        "path": store.path,
        "format_version": store.attributes["format_version"],
        "steps": [int(s) for s in store.steps],
        "num_parameters": store.layout.num_parameters,
        "num_tensors": len(store.layout.tensors),
        "tied": {t.name: t.tied_to for t in store.layout.tensors if t.tied_to},
        "dtypes": sorted({part.dtype for part in moving}),
        "encodings": sorted({part.encoding for part in moving}),
        "mantissa_bits": store.mantissa_bits,
        "exact": store.exact,
        "source": store.attributes["source"],
        "base": store.attributes["base"],
        "metrics": sorted(store.metric_names()),
        "bytes": sizes,
        "checkpoint_bytes": checkpoint_bytes,
        "relexkit_version": store.attributes["relexkit_version"],
    }
    if as_json:
        print_json(document)
        return
    kept = "bit for bit" if store.exact else f"float deltas, {store.mantissa_bits} mantissa bits"
    log = sizes.get("updates", 0) + sizes.get("deltas", 0) + sizes.get("factors", 0)
    whole = checkpoint_bytes * max(1, len(store.steps))
    merged = "merged " if store.has_factors else ""
    rows = [
        ("steps", describe_steps(store.steps)),
        ("parameters", f"{store.layout.num_parameters:,} in {len(store.layout.tensors)} tensors"),
        ("recorded as", f"{', '.join(document['dtypes'])}, {' and '.join(document['encodings'])} encoding ({kept})"),
        ("source", f"{store.attributes['source']}; base {store.attributes['base']['description']}"),
        ("on disk", f"{size_text(sum(sizes.values()))}: steps {size_text(log)}, base {size_text(sizes.get('base', 0))}"),
        (
            "instead of",
            f"{size_text(whole)} of {merged}checkpoints (the steps take 1/{max(1, round(whole / max(1, log)))} of them)",
        ),
    ]
    if document["tied"]:
        rows.append(("tied", ", ".join(f"{a} = {b}" for a, b in document["tied"].items())))
    if document["metrics"]:
        rows.append(("metrics", ", ".join(document["metrics"])))
    print_pairs(store.path, rows)


def _verify(parsed: argparse.Namespace) -> None:
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(parsed.store)
    with progress_bar() as progress:
        store.verify(progress)
    if parsed.json:
        print_json({"path": store.path, "steps": [int(s) for s in store.steps], "verified": True})
    else:
        print(f"{store.path}: every chunk of {describe_steps(store.steps)} and of the base is intact")


def _spectrum(parsed: argparse.Namespace) -> None:
    from relexkit.metrics import informative_steps, learning_rates
    from relexkit.spectrum import spectrum
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(parsed.store)
    with observer(parsed) as observed:
        matrices = observed.gram(store, parsed.until)
    if observed.silent:
        return
    metrics = store.metrics()
    result = spectrum(
        matrices, scope=parsed.scope, until=parsed.until, centered=parsed.centered, momentum=parsed.momentum,
        rates=learning_rates(store.steps, metrics),
    )  # fmt: skip
    informative = informative_steps({name: values[: len(result.steps)] for name, values in metrics.items()})
    if parsed.json:
        print_json(_spectrum_document(result, informative))
    else:
        _print_spectrum(result, parsed.all, informative)
    if parsed.plot:
        figures = import_module("analysis.figures")
        for path in figures.plot_spectra(matrices, parsed.plot, centered=parsed.centered):
            say(f"wrote {path}")
    if parsed.csv:
        from relexkit.variance import write_csv

        write_csv(result, parsed.csv)
        say(f"wrote {parsed.csv}")
    if parsed.directions:
        from relexkit.directions import write_directions

        with progress_bar() as progress:
            paths = write_directions(
                store, matrices, parsed.directions, count=parsed.components or min(2, len(matrices.steps)), scope=parsed.scope,
                centered=parsed.centered, progress=progress,
            )  # fmt: skip
        for path in paths:
            say(f"wrote {path}")


def _spectrum_document(result: Spectrum, informative: Informative | None) -> dict[str, Any]:
    scopes = [
        {
            "name": s.name,
            "num_parameters": s.num_parameters,
            "energy_share": s.energy_share,
            "singular_values": s.singular_values.tolist(),
            "explained_variance_ratio": s.explained_variance_ratio.tolist(),
            "n_components": {str(p): s.num_directions(p / 100) for p in (90, 95, 99)},
            "coefficients": s.coefficients.tolist(),
            "r2": s.r2.tolist(),
            "drift": s.drift.tolist(),
            "update_cosines": s.update_cosines.tolist(),
            "changed": s.changed.tolist(),
            "moved": s.moved.tolist(),
            "unit_moves": s.unit_moves,
            "null": _null_document(s.null),
            "ratio_error": s.ratio_error,
            "angle_error": s.angle_error,
        }
        for s in result.scopes
    ]
    null = {"explained_variance_ratio": result.null.explained_variance_ratio.tolist(), "r2": result.null.r2.tolist()}
    return {
        "steps": result.steps.tolist(),
        "centered": result.centered,
        "scope": result.scope,
        "scopes": scopes,
        "null": null,
        "whole": _null_document(result.whole),
        "model": result.fit.summary() if result.fit else None,
        "informative_steps": asdict(informative) if informative else None,
    }


def _null_document(null: WalkNull | None) -> dict[str, Any] | None:
    if null is None:
        return None
    return {
        name: {
            "observed": null.observed[name],
            "walk": null.expected[name],
            "walk_interval": [null.low[name], null.high[name]],
            "p_value": null.p_value[name],
        }
        for name in null.observed
    }


def _print_spectrum(result: Spectrum, show_all: bool, informative: Informative | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    about = "centered: about the mean checkpoint" if result.centered else "uncentered: about the base"
    title = f"Spectrum of {len(result.steps)} steps, {result.steps[0]} to {result.steps[-1]} ({about})"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold")
    table.add_column(result.scope, overflow="fold")
    for heading in ("parameters", "energy", "1st % (walk)", "1st-2nd % (walk)", "90/95/99 %", "R² (walk)", "cos (walk)",
                    "straight (walk)", "drift (walk)", "changed/step", "ever"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(s: ScopeSpectrum) -> list[str]:
        null = s.null
        assert null is not None
        shown = [_with_null(null, name) for name in ("first", "first_two", "r2", "cosine", "straightness", "drift")]
        return [
            escape(s.name),
            f"{s.num_parameters:,}",
            percent(s.energy_share),
            *shown[:2],
            "/".join(str(s.num_directions(p) or "-") for p in (0.9, 0.95, 0.99)),
            *shown[2:],
            percent(float(s.changed.mean())),
            percent(float(s.moved[-1])),
        ]

    ordered = result.scopes if result.scope in ("global", "layer") else sorted(
        result.scopes, key=lambda s: -s.energy_share if s.energy_share == s.energy_share else 1.0
    )  # fmt: skip
    shown = ordered if show_all else ordered[:_SHOWN_ROWS]
    for s in shown:
        table.add_row(*cells(s))
    console().print(table)
    if len(shown) < len(ordered):
        print(f"({len(ordered) - len(shown)} more rows hold less energy: --all shows them)")
    for line in spectrum_notes(result, informative):
        print(line)


def _with_null(null: WalkNull, name: str) -> str:
    """A statistic and, in parentheses, what its walk gives."""
    value, walk = null.observed[name], null.expected[name]
    if math.isnan(value):
        return "-"
    text, beside = (f"{100 * v:.1f}" if name.startswith("first") else number(v) for v in (value, walk))
    return f"{text} [dim]({beside})[/dim]"


def spectrum_notes(result: Spectrum, informative: Informative | None = None) -> list[str]:
    """What a reader of the table must know, in sentences."""
    notes = [
        "1st, 1st-2nd: explained variance ratio of the first direction, the first two. R²: first coefficient on the step. "
        "cos: mean cosine of neighbouring updates. straight: distance from the base over the length of the path. "
        "drift: first direction of half the steps against all, |cos|.",
        "In parentheses: a walk without direction, of the run's own step sizes and momentum; only what exceeds it is evidence.",
        *_headline(result),
    ]
    if informative and informative.count < informative.known:
        notes.append(
            f"{informative.count} of {informative.known} steps were informative ({informative.metric}); between them the "
            "optimizer coasts on its momentum, which looks like a line and is none."
        )
    still = [s.name for s in result.scopes if not len(s.singular_values)]
    if still:
        shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        notes.append(f"Never moved, so there is no variance to explain: {shown}.")
    doubtful = max((s.ratio_error for s in result.scopes if s.ratio_error == s.ratio_error), default=0.0)
    if doubtful > 1e-5:
        notes.append(f"Approximate (randomized PCA): the first two ratios are off by at most about {doubtful:.1g}.")
    if len(result.steps) == 1:
        notes.append("One recorded step: there is one direction by definition; record more steps to learn anything.")
    changes = [(float(s.changed.sum()) * s.num_parameters, s.unit_moves) for s in result.scopes if not math.isnan(s.unit_moves)]
    total = sum(count for count, _ in changes)
    if total and total < 0.5 * sum(s.num_parameters for s in result.scopes) * len(result.steps):
        share = sum(count * unit for count, unit in changes) / total
        notes.append(
            f"Resolution: few weights change at a step, {100 * share:.0f} % of the changes by exactly one unit in the last "
            "place: the stored precision hides most of the motion. Record float32 weights where possible."
        )
    return notes


def _headline(result: Spectrum) -> list[str]:
    """The run as a whole against its walk, and what the trajectory model says about a drift."""
    fit, whole = result.fit, result.whole
    if fit is None:
        return []
    lines = []
    if whole.num_flips:
        first = f"{percent(whole.observed['first'])} against {percent(whole.expected['first'])} "
        first += f"({percent(whole.low['first'])} to {percent(whole.high['first'])}, p = {whole.p_value['first']:.2g})"
        line = f"R² {number(whole.observed['r2'])} against {number(whole.expected['r2'])} "
        line += f"({number(whole.low['r2'])} to {number(whole.high['r2'])}, p = {whole.p_value['r2']:.2g})"
        lines.append(
            f"Whole run against {whole.num_flips} walks with momentum {fit.momentum:.2f} and its own updates, signs flipped: "
            f"first direction {first}; {line}."
        )
    low, high = fit.drift_to_noise_interval
    short, long = fit.correlation_time_interval
    lines.append(
        f"Drift to noise {fit.drift_to_noise:.2g} ({low:.2g} to {high:.2g}; above 1 a line beats standing still), lasting "
        f"{steps_text(fit.correlation_time)} ({steps_text(short)} to {steps_text(long)}); chance of this evidence on a walk: "
        f"{fit.p_value:.2g}."
    )
    return lines


def steps_text(value: float) -> str:
    """A number of steps, or that it has no end."""
    return "the whole run and on" if math.isinf(value) else f"{value:.3g} steps"


def _extrapolate(parsed: argparse.Namespace) -> None:
    from relexkit.adapters import extrapolate_adapter
    from relexkit.extrapolators import Options, step_text
    from relexkit.materialize import extrapolate
    from relexkit.store import TrajectoryStore

    options = Options(
        rank=parsed.rank, fit=parsed.fit, degree=parsed.degree, window=parsed.window, refit_every=parsed.refit_every,
        axis=parsed.axis, anchor=parsed.anchor, alpha=parsed.alpha,
    )  # fmt: skip
    store = TrajectoryStore(parsed.store)
    if parsed.adapter is not None:
        with progress_bar() as progress:
            adapters = extrapolate_adapter(
                store, parsed.to, parsed.out, rank=parsed.adapter or None, until=parsed.until,
                method=parsed.method, options=options, scope=parsed.scope, scale=parsed.scale, progress=progress,
            )  # fmt: skip
        if parsed.json:
            print_json([asdict(a) | {"folder": str(a.folder)} for a in adapters])
            return
        for a in adapters:
            there = " (was there already)" if a.already else ""
            print(f"step {step_text(a.target)}: {a.folder}, rank {a.rank}, relative error {a.error:.1e}{there}")
        return
    with observer(parsed) as observed:
        written = extrapolate(
            store, parsed.to, parsed.out, until=parsed.until, method=parsed.method, options=options, scope=parsed.scope,
            scale=parsed.scale, dtype=parsed.dtype, rounding=parsed.rounding, seed=parsed.seed, progress=observed.progress,
            **observed.arguments(store, parsed.until),
        )  # fmt: skip
    if observed.silent:
        return
    if parsed.json:
        print_json([{"target": p.target, "folder": str(p.folder), "already": p.already} for p in written])
        return
    for p in written:
        print(f"step {step_text(p.target)}: {p.folder}" + (" (was there already)" if p.already else ""))


def _checkout(parsed: argparse.Namespace) -> None:
    from relexkit.adapters import checkout_adapter
    from relexkit.materialize import checkout
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(parsed.store)
    with progress_bar() as progress:
        if parsed.adapter:
            folder = checkout_adapter(store, parsed.step, parsed.out)
        else:
            folder = checkout(store, parsed.step, parsed.out, progress=progress)
    exact = (store.exact and (parsed.adapter or not store.has_factors)) or parsed.step == 0
    if parsed.json:
        print_json({"step": parsed.step, "folder": str(folder), "exact": exact})
    else:
        kept = "bit for bit" if exact else f"to {store.mantissa_bits} mantissa bits of the delta"
        if store.has_factors and parsed.step and not parsed.adapter:
            kept = "merged; --adapter writes the adapter itself"
        print(f"step {parsed.step}: {folder} ({kept})")


def _round(parsed: argparse.Namespace) -> None:
    from relexkit.materialize import round_checkpoint

    with progress_bar() as progress:
        folder = round_checkpoint(
            parsed.source, parsed.out, dtype=parsed.dtype, rounding=parsed.rounding, seed=parsed.seed, progress=progress
        )
    if parsed.json:
        print_json({"folder": str(folder), "dtype": parsed.dtype, "rounding": parsed.rounding, "seed": parsed.seed})
    else:
        print(f"{folder}: {parsed.dtype}, {parsed.rounding} rounding")


# -- parsing ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relexkit", description="Trajectory stores, spectra and extrapolated checkpoints of RL runs of language models."
    )
    parser.add_argument("--version", action="version", version=f"relexkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    command = add("import", _import, "import a run's checkpoints into a trajectory store; run again to add new steps")
    command.add_argument(
        "source", metavar="SRC", help="folder with checkpoint-N, global_step_N or step_N inside, or hf://OWNER/NAME"
    )
    command.add_argument("--format", metavar="F", help="peft, huggingface, verl, dcp or deepspeed (default: the most precise)")
    command.add_argument("--step-map", metavar="MAP",
                         help="optimizer steps per label (2, 1/4), or a JSON file {label: step}")  # fmt: skip
    command.add_argument("-o", "--out", required=True, metavar="RUN.zarr", help="the store to write or to continue")
    command.add_argument(
        "--base", metavar="DIR", help="the base model, a folder or hf://OWNER/NAME (default: the run's step 0)"
    )
    command.add_argument("--steps", metavar="A:B:C", help="only steps from A to B, both included, in strides of C")
    command.add_argument("--encoding", choices=("auto", "exact", "float"), default="auto",
                         help="exact keeps every bit; auto: exact for 16 bits, float deltas for float32")  # fmt: skip
    command.add_argument("--mantissa-bits", type=int, metavar="N", help="precision of float deltas, 1 to 23 (default: 10)")
    command.add_argument(
        "--dry-run", action="store_true", help="write nothing; say what would be written, and how long it takes"
    )

    for name, run, text in (
        ("info", _info, "say what is inside a store, or which checkpoints a folder holds"),
        ("verify", _verify, "read every chunk of a store and compare it with its checksums"),
    ):
        add(name, run, text).add_argument("store", metavar="RUN.zarr")

    command = add("spectrum", _spectrum, "principal directions of the updates, beside those of a walk without direction")
    command.add_argument("store", metavar="RUN.zarr")
    command.add_argument("--scope", choices=("tensor", "layer", "module", "global"), default="tensor")
    command.add_argument("--until", type=int, metavar="STEP", help="use only steps up to this one")
    command.add_argument("--centered", action="store_true", help="PCA about the mean checkpoint instead of the base")
    command.add_argument("--momentum", type=float, metavar="BETA",
                         help="of the walk to compare with: Adam's first beta (default: fitted)")  # fmt: skip
    command.add_argument("--all", action="store_true", help=f"print every row, not only the {_SHOWN_ROWS} with most energy")
    command.add_argument("--plot", type=Path, metavar="DIR", help="also write figures there")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")
    command.add_argument("--directions", type=Path, metavar="DIR",
                         help="also write the first 2 (or --components) directions there as safetensors")  # fmt: skip
    add_pca(command)

    command = add("extrapolate", _extrapolate, "write the predicted checkpoints of future steps")
    command.add_argument("store", metavar="RUN.zarr")
    command.add_argument("--to", type=_step, nargs="+", required=True, metavar="STEP", help="target steps")
    command.add_argument("-o", "--out", required=True, metavar="OUT", help="folder for OUT/step-STEP/")
    command.add_argument("--until", type=int, metavar="T_CUT", help="use only steps up to this one")
    command.add_argument("--method", default="relex", help="relex, reconstruct, least-squares, least-squares-origin, "
                         "two-point, first-update, hold or model (default: relex)")  # fmt: skip
    command.add_argument("--rank", type=int, default=1, help="principal directions to keep (default: 1)")
    command.add_argument("--fit", choices=("linear", "polynomial", "sinusoid"), default="linear")
    command.add_argument("--degree", type=int, default=2, help="of the polynomial (default: 2)")
    command.add_argument("--window", type=int, metavar="W", help="fit only the last W recorded steps")
    command.add_argument("--refit-every", type=int, metavar="F", help="autoregressive: refit after every F predicted steps")
    command.add_argument("--axis", choices=("step", "row"), default="step",
                         help="fit against step numbers, or row numbers as the released RELEX scripts do")  # fmt: skip
    command.add_argument("--anchor", type=int, metavar="STEP", help="two-point: the earlier point (default: the base)")
    command.add_argument("--alpha", type=float, help="first-update: multiple of the first delta (default: target / first step)")
    command.add_argument("--scope", choices=("tensor", "layer", "module", "global"),
                         help="what shares one fit (default: tensor; model: global)")  # fmt: skip
    command.add_argument("--scale", type=float, default=1.0, help="multiply the predicted displacement (default: 1)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the output (default: as recorded)")
    command.add_argument("--adapter", type=_rank, nargs="?", const=0, metavar="RANK",
                         help="from a store of PEFT adapters: write an adapter, of this rank or one that fits")  # fmt: skip
    _add_rounding(command)
    add_pca(command)

    command = add("checkout", _checkout, "write a recorded step as a checkpoint; step 0 is the base")
    command.add_argument("store", metavar="RUN.zarr")
    command.add_argument("--step", type=int, required=True)
    command.add_argument("-o", "--out", required=True, metavar="DIR")
    command.add_argument(
        "--adapter", action="store_true", help="from a store of PEFT adapters: the adapter, not merged weights"
    )

    command = add("round", _round, "write any checkpoint in another precision, stochastically rounded")
    command.add_argument("source", metavar="SRC", help="a checkpoint folder in any known format")
    command.add_argument("-o", "--out", required=True, metavar="DIR")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    _add_rounding(command)

    for name, (_, text) in COMMAND_MODULES.items():
        commands.add_parser(name, help=text)  # for the list; main() asks the owner for the options
    return parser


def _module_parser(name: str) -> argparse.ArgumentParser:
    module, text = COMMAND_MODULES[name]
    try:
        owner = import_module(module)
    except ModuleNotFoundError as error:
        raise RelexkitError(f"{name} needs the package {error.name}; install it with: pip install 'relexkit[train]'") from None
    parser = argparse.ArgumentParser(prog=f"relexkit {name}", description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    owner.add_arguments(parser)
    parser.set_defaults(run=owner.run)
    return parser


def _add_rounding(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic")
    command.add_argument("--seed", type=int, default=0, help="of the stochastic rounding (default: 0)")


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RelexkitError(f"--adapter {text!r} is not a rank; expected a whole number from 1 upwards, or nothing")
    return int(text)


def _step(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RelexkitError(f"--to {text!r} is not a number; expected an optimizer step such as 500") from None
