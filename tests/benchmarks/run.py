"""Measure relexkit against its budgets, and against the released RELEX scripts where a clone of
them is given.

    python tests/benchmarks/run.py [--run DIR] [--reference DIR] [--repeats N] [--only PART ...]
    [--json FILE]

DIR has ``base/``, ``bfloat16/checkpoint-N`` and ``float32/checkpoint-N``, as
``docs/smollm2-run/make_run.py`` writes them; without it a small synthetic run is made.
``--reference`` is a clone of https://github.com/weizhepei/RELEX. Every number is of whole processes
on this machine, ours and theirs in turn within one session; what counts are the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from budgets import HEADINGS, budgets
from measure import (
    Cost,
    forget,
    machine,
    memory_bytes,
    output_of,
    read_once,
    remove,
    run,
    size_of,
    write_once,
)
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RELEXKIT = (sys.executable, "-m", "relexkit")
SOURCES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, where the files go, and how often."""

    run: Path
    work: Path
    reference: Path | None
    repeats: int
    target: int
    cold: bool
    wanted: tuple[str, ...] = SOURCES

    @property
    def base(self) -> Path:
        return self.run / "base"

    @property
    def log(self) -> Path:
        """Everything that the measured commands print."""
        return self.work / "commands.log"

    def sources(self) -> list[str]:
        """The precisions to measure that the run has."""
        return [name for name in self.wanted if (self.run / name).is_dir()]

    def files(self, source: str) -> list[Path]:
        """Weight files of all checkpoints, in the order of the steps."""
        folders = (p for p in (self.run / source).iterdir() if p.name.startswith("checkpoint-"))
        ordered = sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]))
        return [path for folder in ordered for path in sorted(folder.glob("*.safetensors"))]

    def last_step(self) -> int:
        """The last step of the run."""
        return int(self.files(self.sources()[0])[-1].parent.name.rpartition("-")[2])

    def fits_cache(self, source: str) -> bool:
        """Whether the checkpoints can stay in the page cache, with room for the work."""
        return sum(map(size_of, self.files(source))) < 0.6 * memory_bytes()

    def prepare_cache(self, source: str) -> None:
        """The same start for everything that reads the checkpoints: all of them in the page cache,
        or none.
        """
        if self.cold:
            forget([*self.files(source), *self.base.glob("*.safetensors")])
        else:
            read_once([*self.files(source), *self.base.glob("*.safetensors")])

    def relexkit(self, *words: str | Path, leaves: Iterable[Path] = ()) -> Cost:
        """One relexkit command as a process."""
        return run([*RELEXKIT, *words], self.log, leaves)

    def json_of(self, *words: str | Path) -> Any:
        """The JSON document that a command prints."""
        return json.loads(output_of(words, self.log))


# -- checkpoints in, a checkpoint out --------------------------------------------------------------


def measure_pipeline(bench: Bench) -> dict[str, Any]:
    """Import, Gram matrices, one extrapolated checkpoint; the released scripts; reading the files
    once.
    """
    result: dict[str, Any] = {"startup": asdict(bench.relexkit("--version"))}
    for source in bench.sources():
        result[source] = {
            "limit_seconds": [],
            "relexkit": [],
            "copied": [],
            "released": [],
            "cached": not bench.cold and bench.fits_cache(source),
        }
    for repeat in range(bench.repeats):
        for source in bench.sources():
            rounds = result[source]
            bench.prepare_cache(source)
            rounds["limit_seconds"].append(read_once(bench.files(source)))
            sides: list[tuple[str, Callable[[Bench, str], dict[str, Cost]]]] = [
                ("relexkit", _ours),
                ("copied", _copied),
            ]
            if bench.reference and source == "bfloat16":
                sides.append(("released", _released))
            for side, stages in sides if repeat % 2 == 0 else reversed(sides):
                bench.prepare_cache(source)
                rounds[side].append(
                    {name: asdict(cost) for name, cost in stages(bench, source).items()}
                )
    for source in bench.sources():
        result[source]["disk"] = _disk(bench, source)
    return result


def _store(bench: Bench, source: str) -> Path:
    return bench.work / f"{source}.zarr"


def _ours(bench: Bench, source: str) -> dict[str, Cost]:
    store, out = _store(bench, source), bench.work / f"predicted-{source}"
    remove(store, out)
    stages = {
        "import": bench.relexkit(
            "import", bench.run / source, "-o", store, "--base", bench.base, leaves=[store]
        ),
        "Gram": bench.relexkit(
            "spectrum", store, "--scope", "global", "--json", leaves=[store / "gram"]
        ),
        "extrapolate": bench.relexkit(
            "extrapolate", store, "--to", str(bench.target), "-o", out, leaves=[out]
        ),
    }
    remove(out)
    return {**stages, "all": stages["import"].then(stages["Gram"]).then(stages["extrapolate"])}


def _copied(bench: Bench, source: str) -> dict[str, Cost]:
    """``cp -r`` of the folder."""
    out = bench.work / "copied"
    remove(out)
    cost = run(["cp", "-r", bench.run / source, out], bench.log, [out])
    remove(out)
    return {"all": cost}


def _released(bench: Bench, source: str) -> dict[str, Cost]:
    deltas, out = bench.work / "released-deltas", bench.work / "released-predicted"
    remove(deltas, out)
    stages = {
        "deltas": run(_released_deltas(bench, source), bench.log, [deltas]),
        "SVD and extrapolate": run(_released_svd(bench), bench.log, [out]),
    }
    remove(deltas, out)
    return {**stages, "all": stages["deltas"].then(stages["SVD and extrapolate"])}


def _released_deltas(bench: Bench, source: str) -> list[str | Path]:
    """Their first command. It finds only folders with its own trainer's names."""
    assert bench.reference is not None
    links = bench.work / "global-steps"
    remove(links)
    links.mkdir()
    for path in bench.files(source):
        link = links / f"global_step_{path.parent.name.rpartition('-')[2]}"
        if not link.exists():
            link.symlink_to(path.parent.resolve(), target_is_directory=True)
    script = bench.reference / "scripts" / "precompute_deltas.py"
    words: list[str | Path] = [
        sys.executable,
        script,
        "--base_model",
        bench.base,
        "--checkpoint_dir",
        links,
    ]
    return [*words, "--output_dir", bench.work / "released-deltas"]


def _released_svd(bench: Bench, cache: Path | None = None) -> list[str | Path]:
    """Their second command, rank 1 and linear as in the paper; with ``cache`` it also keeps
    directions and coefficients.
    """
    assert bench.reference is not None
    script = bench.reference / "scripts" / "svd_extrapolation.py"
    words: list[str | Path] = [
        sys.executable,
        script,
        "--delta_dir",
        bench.work / "released-deltas",
        "--base_model",
        bench.base,
        "--output_dir",
        bench.work / "released-predicted",
        "--history_steps",
        str(bench.last_step()),
        "--rank",
        "1",
        "--target_steps",
        str(bench.target),
        "--target_step_scaling_factor",
        "1",
        "--mode",
        "extrapolate",
        "--fit_method",
        "linear",
    ]
    return [*words, "--svd_cache_dir", cache] if cache else words


def _disk(bench: Bench, source: str) -> dict[str, Any]:
    info = bench.json_of(*RELEXKIT, "info", _store(bench, source), "--json")
    sizes = info["bytes"]
    log = sizes.get("updates", 0) + sizes.get("deltas", 0)
    return {
        "checkpoints": sum(map(size_of, bench.files(source))),
        "steps": log,
        "base": sizes.get("base", 0),
        "gram": sizes.get("gram", 0),
        "rest": sum(sizes.values()) - log - sizes.get("base", 0) - sizes.get("gram", 0),
        "encodings": info["encodings"],
        "exact": info["exact"],
    }


# -- further questions, further targets ------------------------------------------------------------


def ensure_store(bench: Bench, source: str) -> Path:
    """The store of a source with its Gram matrices, made now if no earlier part has made it."""
    store = _store(bench, source)
    if not (store / "gram").is_dir():
        bench.relexkit("import", bench.run / source, "-o", store, "--base", bench.base)
        bench.relexkit("spectrum", store, "--scope", "global", "--json")
    return store


def measure_questions(bench: Bench, num_tensors: int, num_steps: int) -> dict[str, Any]:
    """Other cuts, scopes and centring on a finished store: as commands, and inside one process."""
    store, half = ensure_store(bench, bench.sources()[0]), str(max(1, bench.last_step() // 2))
    asked = (
        ("--version",),
        ("info", store, "--json"),
        ("spectrum", store, "--json"),
        ("spectrum", store, "--until", half, "--scope", "tensor", "--json"),
        ("spectrum", store, "--scope", "layer", "--centered", "--json"),
        ("spectrum", store, "--until", half, "--scope", "module"),
        ("spectrum", store, "--scope", "global", "--centered", "--json"),
    )
    commands = {
        " ".join(str(w) for w in words if w != store): [
            asdict(bench.relexkit(*words)) for _ in range(bench.repeats)
        ]
        for words in asked
    }
    sizes = ("--tensors", str(num_tensors), "--steps", str(num_steps))
    inside = [
        bench.json_of(sys.executable, HERE / "questions.py", store, *sizes)
        for _ in range(bench.repeats)
    ]
    seconds = {name: [one["seconds"][name] for one in inside] for name in inside[0]["seconds"]}
    return {"commands": commands, "inside": {**inside[0], "seconds": seconds}}


def measure_targets(bench: Bench) -> dict[str, Any]:
    """One, two and four targets in one command; a further one against writing so many bytes, in
    seconds of processor time.
    """
    result: dict[str, Any] = {}
    out, counts = bench.work / "targets", (1, 2, 4)
    for source in bench.sources():
        store = ensure_store(bench, source)
        costs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
        writing = []
        for _ in range(bench.repeats):
            for count in counts:
                remove(out)
                targets = [str(bench.target + 10 * i) for i in range(count)]
                costs[count].append(
                    asdict(
                        bench.relexkit(
                            "extrapolate", store, "--to", *targets, "-o", out, leaves=[out]
                        )
                    )
                )
            remove(out)
            writing.append(write_once(bench.work / "written", costs[1][-1]["left_bytes"]))
        more = [
            (four["cpu_seconds"] - one["cpu_seconds"]) / 3
            for one, four in zip(costs[1], costs[4], strict=True)
        ]
        result[source] = {"costs": costs, "further_target_seconds": more, "write_seconds": writing}
    return result


# -- more cores ------------------------------------------------------------------------------------


def measure_parallel(bench: Bench) -> dict[str, Any]:
    """One core, two threads, two processes, on the bfloat16 checkpoints."""
    words = ("--run", bench.run, "--work", bench.work, "--rounds", str(bench.repeats))
    found: dict[str, Any] = bench.json_of(sys.executable, HERE / "parallel.py", *words)
    return found


# -- agreement -------------------------------------------------------------------------------------


def measure_agreement(bench: Bench) -> dict[str, Any]:
    """Relative errors of predicted deltas against the released scripts and a float64 SVD, rounding
    to nearest.
    """
    store = ensure_store(bench, "bfloat16")
    made, pairs = [], []
    for axis in ("step", "row"):
        folders = []
        for dtype in ("bfloat16", "float32"):
            out = bench.work / f"agreement-{axis}-{dtype}"
            remove(out)
            words = (
                "--to",
                str(bench.target),
                "--axis",
                axis,
                "--dtype",
                dtype,
                "--rounding",
                "nearest",
            )
            bench.relexkit("extrapolate", store, *words, "-o", out)
            made.append(out)
            folders.append(str(out / f"step-{bench.target}"))
        pairs.append(f"relexkit {axis} axis={','.join(folders)}")
    command: list[str | Path] = [
        sys.executable,
        HERE / "agreement.py",
        bench.run,
        "--target",
        str(bench.target),
    ]
    command += ["--ours", *pairs]
    if bench.reference:
        cache, deltas, out = (
            bench.work / "released-cache",
            bench.work / "released-deltas",
            bench.work / "released-predicted",
        )
        remove(cache, deltas, out)
        made += [cache, deltas, out]
        run(_released_deltas(bench, "bfloat16"), bench.log)
        run(_released_svd(bench, cache), bench.log)
        command += ["--reference", f"{out / f'step{bench.target}'},{cache}"]
    result = bench.json_of(*command)
    remove(*made)
    return result


# -- memory against size ---------------------------------------------------------------------------


def measure_memory(bench: Bench, sizes: list[float], steps: list[int]) -> list[dict[str, Any]]:
    """Peak memory of every command while the model and the number of steps grow, on checkpoints
    made for it.

    Float32 runs are recorded as float deltas. They take twice the disk, so they are left out where
    both the model and the number of steps are the largest of several.
    """
    rows = []
    for source in bench.wanted:
        for size in sizes:
            for count in steps:
                if (
                    source == "float32"
                    and len(sizes) > 1
                    and len(steps) > 1
                    and size == max(sizes)
                    and count == max(steps)
                ):
                    continue
                rows.append(_memory_of(bench, source, size, count))
    return rows


def _memory_of(bench: Bench, source: str, size: float, count: int) -> dict[str, Any]:
    made, store, out = bench.work / "made", bench.work / "made.zarr", bench.work / "made-predicted"
    remove(made, store, out)
    words = ("--parameters", str(size), "--steps", str(count), "--shards", "16", "--dtypes", source)
    num_parameters = int(
        output_of([sys.executable, HERE / "synthetic.py", made, *words], bench.log).split()[-1]
    )
    encoding = ("--encoding", "float" if source == "float32" else "exact")
    stages = {
        "import": bench.relexkit(
            "import", made / source, "-o", store, "--base", made / "base", *encoding, leaves=[store]
        ),
        "Gram": bench.relexkit("spectrum", store, "--scope", "global", "--json"),
        "extrapolate": bench.relexkit(
            "extrapolate", store, "--to", str(2 * count), "-o", out, leaves=[out]
        ),
    }
    encodings = bench.json_of(*RELEXKIT, "info", store, "--json")["encodings"]
    remove(made, store, out)
    costs = {name: asdict(cost) for name, cost in stages.items()}
    return {
        "source": source,
        "encodings": encodings,
        "parameters": num_parameters,
        "steps": count,
        **costs,
    }


# -- report ----------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: str = ".2f") -> str:
    """``median (min to max)``, or the one value."""
    ordered = sorted(values)
    middle = format(statistics.median(ordered), digits)
    return (
        middle
        if len(ordered) == 1
        else f"{middle} ({ordered[0]:{digits}} to {ordered[-1]:{digits}})"
    )


def mega(num_bytes: float | None) -> str:
    """Bytes in MB."""
    return (
        "-"
        if num_bytes is None
        else f"{num_bytes / 1e6:,.0f}"
        if num_bytes >= 1e7
        else f"{num_bytes / 1e6:.2f}"
    )


def table(console: Console, title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print one Markdown table with its title above."""
    shown = Table(box=MARKDOWN)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(f"\n{title}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(shown)


def _cost_cells(costs: list[dict[str, Any]]) -> list[str]:
    return [
        spread(c["wall_seconds"] for c in costs),
        spread(c["cpu_seconds"] for c in costs),
        mega(max(c["peak_bytes"] for c in costs)),
        mega(
            max(
                (c["peak_anonymous_bytes"] for c in costs if c["peak_anonymous_bytes"] is not None),
                default=None,
            )
        ),
        mega(max(c["left_bytes"] for c in costs)),
    ]


COST_HEADINGS = ["wall s", "user+system s", "peak MB", "not file pages MB", "files MB"]


def report_pipeline(console: Console, result: dict[str, Any]) -> None:
    """Costs of each stage, the ratios within each repeat, and the disk."""
    for source in (s for s in SOURCES if s in result):
        rounds = result[source]
        rows = [
            ["reading the checkpoints once", spread(rounds["limit_seconds"]), "-", "8", "8", "-"]
        ]
        for side in ("relexkit", "copied", "released"):
            for stage in rounds[side][0] if rounds[side] else ():
                rows.append(
                    [f"{side}: {stage}", *_cost_cells([one[stage] for one in rounds[side]])]
                )
        state = "in the page cache" if rounds["cached"] else "not (or not all) in the page cache"
        table(console, f"{source} checkpoints, {state}", ["", *COST_HEADINGS], rows)
        ours = [one["all"]["wall_seconds"] for one in rounds["relexkit"]]
        times = [o / limit for o, limit in zip(ours, rounds["limit_seconds"], strict=True)]
        console.print(
            f"\nrelexkit takes {spread(times)} times the reading.", highlight=False, soft_wrap=True
        )
        theirs = [one["all"]["wall_seconds"] for one in rounds["released"]]
        if theirs:
            share = [t / o for t, o in zip(theirs, ours, strict=True)]
            message = f"The released scripts take {spread(share)} times relexkit."
            console.print(message, highlight=False, soft_wrap=True)
    rows = []
    for source in (s for s in SOURCES if s in result):
        disk = result[source]["disk"]
        ratio = disk["checkpoints"] / max(1, disk["steps"])
        sizes = [mega(disk[key]) for key in ("checkpoints", "steps", "base", "gram", "rest")]
        kept = "every bit" if disk["exact"] else "rounded deltas"
        rows.append([source, f"{' '.join(disk['encodings'])}, {kept}", *sizes, f"1/{ratio:.1f}"])
    table(
        console,
        "Disk, MB",
        ["source", "store", "checkpoints", "steps", "base", "Gram", "rest", "steps / checkpoints"],
        rows,
    )


def report_questions(console: Console, result: dict[str, Any]) -> None:
    """Commands on a finished store, and calls on made-up Gram matrices."""
    rows = [[name, *_cost_cells(costs)[:4]] for name, costs in result["commands"].items()]
    table(
        console, "Further questions as commands (start-up included)", ["", *COST_HEADINGS[:4]], rows
    )
    inside = result["inside"]
    rows = [
        [name, spread(seconds, ".3f"), inside["failed"].get(name, "")]
        for name, seconds in inside["seconds"].items()
    ]
    title = (
        f"Further questions inside one process, {inside['tensors']} tensors and {inside['steps']}"
        " steps, no weights read"
    )
    table(console, title + " (budget: 1 s)", ["", "s", "failed with"], rows)


def report_targets(console: Console, result: dict[str, Any]) -> None:
    """Several targets at once."""
    rows = []
    for source, found in result.items():
        rows += [
            [f"{source}, {count} targets", *_cost_cells(costs)]
            for count, costs in found["costs"].items()
        ]
    table(console, "Several targets in one command", ["", *COST_HEADINGS], rows)
    for source, found in result.items():
        more, writing = spread(found["further_target_seconds"]), spread(found["write_seconds"])
        message = (
            f"\n{source}: a further target takes {more} s; only writing its bytes takes"
            f" {writing} s."
        )
        console.print(message, highlight=False, soft_wrap=True)


def report_parallel(console: Console, result: dict[str, Any]) -> None:
    """Seconds of the work, and how many times as fast as on one core."""
    rows = []
    for work, found in result.items():
        for way, costs in found.items():
            times = [
                one["seconds"] / cost["seconds"]
                for one, cost in zip(found["one"], costs, strict=True)
            ]
            cells = [spread([cost[key] for cost in costs]) for key in ("seconds", "cpu_seconds")]
            rows.append([f"{work}, {way}", *cells, spread(times)])
    headings = ["", "wall s", "processor s of one process", "times as fast"]
    table(console, "One core and two", headings, rows)


def report_agreement(console: Console, result: dict[str, Any]) -> None:
    """Relative errors of the predicted delta."""
    rows = []
    for pair, found in result.items():
        equal = f"{100 * found['equal_weights']:.4f} %" if "equal_weights" in found else "-"
        errors = [f"{found[key]:.1e}" for key in ("global", "median", "worst")]
        rows.append([pair.replace("|", "against"), *errors, str(found["worst_tensor"]), equal])
    headings = ["", "all weights", "median tensor", "worst tensor", "which", "equal weights"]
    table(
        console,
        "Relative error of the predicted delta, rounded to nearest (budget: 1e-3)",
        headings,
        rows,
    )


def report_memory(console: Console, rows: list[dict[str, Any]]) -> None:
    """Peak memory by size."""
    cells = []
    for row in rows:
        size = [
            row["source"],
            " ".join(row["encodings"]),
            f"{row['parameters'] / 1e6:.1f}",
            str(row["steps"]),
        ]
        peaks = [mega(row[stage]["peak_bytes"]) for stage in ("import", "Gram", "extrapolate")]
        cells.append(
            [
                *size,
                *peaks,
                *(
                    f"{row[stage]['wall_seconds']:.1f}"
                    for stage in ("import", "Gram", "extrapolate")
                ),
            ]
        )
    headings = [
        "source",
        "store",
        "million parameters",
        "steps",
        "import MB",
        "Gram MB",
        "extrapolate MB",
    ]
    headings += ["import s", "Gram s", "extrapolate s"]
    table(console, "Peak memory as model and run grow (budget: 1,074 MB, flat)", headings, cells)


REPORTS: dict[str, Callable[[Console, Any], None]] = {
    "pipeline": report_pipeline,
    "questions": report_questions,
    "targets": report_targets,
    "parallel": report_parallel,
    "agreement": report_agreement,
    "memory": report_memory,
}


# -- command line ----------------------------------------------------------------------------------


def main() -> None:
    """Measure the chosen parts in turn, printing each when it is done."""
    given = _parser().parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=180)
    with tempfile.TemporaryDirectory(prefix="relexkit-bench-", dir=given.work) as temporary:
        work = Path(temporary)
        source = given.run.resolve() if given.run else _make_run(work, given)
        bench = Bench(
            run=source,
            work=work,
            reference=given.reference.resolve() if given.reference else None,
            repeats=given.repeats,
            target=given.target or 0,
            cold=given.cold,
            wanted=tuple(given.sources),
        )
        if not bench.sources():
            wanted = " or ".join(f"{name}/" for name in bench.wanted)
            raise SystemExit(
                f"{bench.run}: has no {wanted} inside; expected what docs/smollm2-run/make_run.py"
                " writes"
            )
        bench = replace(bench, target=given.target or 2 * bench.last_step())
        results: dict[str, Any] = {"machine": machine(), "run": _describe(bench, bool(given.run))}
        _print_machine(console, results)
        measures: dict[str, Callable[[], Any]] = {
            "pipeline": lambda: measure_pipeline(bench),
            "questions": lambda: measure_questions(
                bench, given.question_tensors, given.question_steps
            ),
            "targets": lambda: measure_targets(bench),
            "parallel": lambda: measure_parallel(bench),
            "agreement": lambda: measure_agreement(bench),
            "memory": lambda: measure_memory(bench, given.memory_parameters, given.memory_steps),
        }
        for part in given.only or REPORTS:
            if part in ("agreement", "parallel") and "bfloat16" not in bench.sources():
                print(f"{part}: left out, the run has no bfloat16 checkpoints", file=sys.stderr)
                continue
            print(f"measuring: {part}", file=sys.stderr)
            results[part] = measures[part]()
            REPORTS[part](console, results[part])
            if (
                given.json
            ):  # after every part, so that an interrupted run keeps what it has measured
                given.json.write_text(json.dumps(results, indent=1) + "\n")
        table(console, "Budgets", HEADINGS, [budget.cells() for budget in budgets(results)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure relexkit against its budgets and the released RELEX scripts."
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="base/, bfloat16/ and float32/ (default: a synthetic run)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="clone of weizhepei/RELEX, to measure side by side",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=SOURCES,
        default=SOURCES,
        help="precisions to measure (default: both)",
    )
    parser.add_argument(
        "--target", type=int, metavar="STEP", help="step to predict (default: twice the last one)"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="drop checkpoints from the page cache before each measurement",
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(REPORTS), metavar="PART", help=f"of {', '.join(REPORTS)}"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every measured number there"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="existing folder for temporary files (default: the system's)",
    )
    group = parser.add_argument_group("synthetic runs")
    group.add_argument(
        "--parameters", type=float, default=8e6, help="of the run made without --run (default: 8e6)"
    )
    group.add_argument(
        "--steps", type=int, default=12, help="of the run made without --run (default: 12)"
    )
    group.add_argument(
        "--layers", type=int, default=30, help="of the run made without --run (default: 30)"
    )
    group.add_argument(
        "--question-tensors",
        type=int,
        default=400,
        help="of the made-up Gram matrices (default: 400)",
    )
    group.add_argument(
        "--question-steps", type=int, default=75, help="of the made-up Gram matrices (default: 75)"
    )
    group.add_argument(
        "--memory-parameters",
        type=float,
        nargs="+",
        metavar="D",
        default=[10e6, 40e6, 135e6],
        help="model sizes of the memory part (default: 10e6 40e6 135e6)",
    )
    group.add_argument(
        "--memory-steps",
        type=int,
        nargs="+",
        metavar="T",
        default=[5, 20, 75],
        help="run lengths of the memory part (default: 5 20 75)",
    )
    return parser


def _make_run(work: Path, given: argparse.Namespace) -> Path:
    made = work / "run"
    words = (
        "--parameters",
        str(given.parameters),
        "--steps",
        str(given.steps),
        "--layers",
        str(given.layers),
    )
    output_of([sys.executable, HERE / "synthetic.py", made, *words], work / "commands.log")
    return made


def _describe(bench: Bench, real: bool) -> dict[str, Any]:
    sizes = {source: sum(map(size_of, bench.files(source))) for source in bench.sources()}
    return {
        "folder": bench.run.name if real else "synthetic",
        "last_step": bench.last_step(),
        "target": bench.target,
        "repeats": bench.repeats,
        "checkpoint_bytes": sizes,
        "page_cache": "cold" if bench.cold else "warm",
        "reference": bench.reference is not None,
    }


def _print_machine(console: Console, results: dict[str, Any]) -> None:
    about, described = results["machine"], results["run"]
    packages = ", ".join(
        f"{name} {about[name]}"
        for name in ("python", "numpy", "scipy", "torch", "transformers", "zarr")
    )
    sizes = ", ".join(
        f"{mega(size)} MB in {source}" for source, size in described["checkpoint_bytes"].items()
    )
    lines = (
        (
            f"{about['processor']}, {about['cores']} cores, {mega(about['memory_bytes'])} MB of"
            f" memory, {about['system']}, load {about['load_before']} at the start"
        ),
        f"relexkit {about['relexkit']}, {packages}",
        (
            f"Run: {described['folder']}, up to step {described['last_step']}, {sizes}; target"
            f" {described['target']}, {described['repeats']} repeats, page cache"
            f" {described['page_cache']}. Cells: median (least to most); peaks: most."
        ),
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
