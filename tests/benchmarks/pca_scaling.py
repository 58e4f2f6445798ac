"""How the PCA passes scale, how near they come to only reading, and how they compare with other
packages.

    python tests/benchmarks/pca_scaling.py WORK [--only limit size steps peers] [--json FILE]
    [--repeats N] [--plot FILE]

Stores are made under WORK and removed. Every number is of a process of its own (``pca_passes.py``),
all sides in turn; peak memory is that of memory which is no page of a file, with Python and its
packages. Peers need the extra ``bench``, and the released RELEX scripts a clone that the variable
RELEX_CLONE names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import machine, remove, run

HERE = Path(__file__).resolve().parent
PEERS = (
    "IncrementalPCA",
    "randomized_svd",
    "covariance_eigh",
    "svd_compressed",
    "pca_lowrank",
    *(("RELEX",) if "RELEX_CLONE" in os.environ else ()),
)


def job(work: Path, *words: str | Path) -> dict[str, Any]:
    """One job: its document, with the peak memory of its process."""
    out, log = work / "job.json", work / "jobs.log"
    remove(out)
    out.touch()
    code = (
        f"import sys, runpy; sys.argv = {[str(HERE / 'pca_passes.py'), *map(str, words)]!r};"
        f" sys.path.insert(0, {str(HERE)!r});"
    )
    code += (
        f" sys.stdout = open({str(out)!r}, 'w'); runpy.run_path(sys.argv[0], run_name='__main__');"
        " sys.stdout.close()"
    )
    cost = run([sys.executable, "-c", code], log)
    text = out.read_text().strip()
    return {**(json.loads(text) if text else {}), "peak_bytes": cost.peak_anonymous_bytes}


def rounds(
    work: Path, names: tuple[str, ...], store: Path, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Every job in turn, ``repeats`` times, with one more before that fills the page cache."""
    job(work, names[0], store)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            found[name].append(job(work, name, store))
    return found


def measure(
    work: Path, num_parameters: float, num_steps: int, names: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    """A store of that size, the jobs on it, and the store gone."""
    store = work / "made.zarr"
    job(
        work,
        "make",
        store,
        str(num_parameters),
        str(num_steps),
        *(["matrix"] if set(names) & set(PEERS) else []),
    )
    result = {
        "parameters": num_parameters,
        "steps": num_steps,
        "jobs": rounds(work, names, store, repeats),
    }
    if set(names) & set(PEERS):
        result["truth"] = job(work, "truth", store)
    remove(store, store.with_suffix(".npy"))
    return result


def middle(rows: list[dict[str, Any]], key: str) -> str:
    """Median (least to most)."""
    values = sorted(row[key] for row in rows)
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def report(results: dict[str, Any]) -> None:
    """Markdown tables on standard output."""
    for part in ("limit", "size", "steps", "peers"):
        if part not in results:
            continue
        print(
            f"\n## {part}\n\n| D | T | job | wall s | CPU s | peak MB | error of the first two"
            " ratios |"
        )
        print("|---|---|---|---|---|---|---|")
        for case in results[part]:
            for name, rows in case["jobs"].items():
                error = ""
                if "truth" in case and "ratios" in rows[0]:
                    truth = case["truth"]["centered" if rows[0].get("centered") else "uncentered"]
                    worst = max(abs(a - b) for a, b in zip(rows[0]["ratios"], truth, strict=True))
                    error = f"{worst:.1e}"
                peak = max(row["peak_bytes"] or 0 for row in rows) / 1e6
                print(
                    f"| {case['parameters']:.0e} | {case['steps']} | {name} |"
                    f" {middle(rows, 'seconds')} | {middle(rows, 'cpu_seconds')} | {peak:.0f} |"
                    f" {error} |"
                )


def plot(results: dict[str, Any], path: Path) -> None:
    """Processor seconds against D, against T, and peak memory against D."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from relexkit.analysis.style import DOTS_PER_INCH, MUTED, RUN, SECOND, WIDTH_INCHES, styled

    looks = {
        "exact": (RUN, "o", "exact"),
        "randomized": (SECOND, "s", "randomized"),
        "limit": (MUTED, "^", "reading alone"),
    }
    with styled():
        views = [
            ("size", "parameters", "cpu_seconds"),
            ("steps", "steps", "cpu_seconds"),
            ("size", "parameters", "peak_bytes"),
        ]
        views = [view for view in views if results.get(view[0])]
        figure, panels = plt.subplots(
            1, len(views), figsize=(WIDTH_INCHES, 2.2), layout="constrained"
        )
        for axes, (part, key, field) in zip(panels, views, strict=True):
            for name, (colour, marker, word) in looks.items():
                cases, unit = results[part], 1e-6 if field == "peak_bytes" else 1.0
                values = [
                    statistics.median(r[field] for r in c["jobs"][name]) * unit for c in cases
                ]
                axes.plot([c[key] for c in cases], values, marker=marker, color=colour, label=word)
            steps, numel = results[part][0]["steps"], results[part][0]["parameters"]
            rest = f"{steps} steps" if key == "parameters" else f"{numel / 1e6:g}M parameters"
            axes.set(
                xscale="log",
                xlabel=f"{key} ({rest})",
                title="Peak memory, MB" if unit < 1 else "Processor seconds",
            )
            axes.set(**({"ylim": (0, None)} if unit < 1 else {"yscale": "log"}))
            axes.xaxis.set_major_formatter(
                lambda at, _: f"{at / 1e6:g}M" if at >= 1e6 else f"{at:g}"
            )
            axes.yaxis.set_major_formatter(lambda at, _: f"{at:g}")
            axes.minorticks_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("limit", "size", "steps", "peers"),
        default=["limit", "size", "steps", "peers"],
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[3e6, 1e7, 3e7, 1e8])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--fixed-steps", type=int, default=5)
    parser.add_argument("--fixed-size", type=float, default=1e6)
    parser.add_argument("--peer-size", type=float, default=2e6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    results = (
        json.loads(given.json.read_text())
        if given.json and given.json.exists()
        else {"machine": machine()}
    )
    both = ("limit", "exact", "randomized")
    cases = {
        "limit": [(1.6e7, count, both[:2]) for count in (10, 20, 40)],
        "size": [(size, given.fixed_steps, both) for size in given.sizes],
        "steps": [(given.fixed_size, count, both) for count in given.steps],
        "peers": [(given.peer_size, 60, ("exact", "randomized", *PEERS))],
    }
    for part in given.only:
        results[part] = []
        for size, count, names in cases[part]:
            results[part].append(measure(given.work, size, count, names, given.repeats))
            if given.json:  # after every case, so that an interrupted run keeps what it has
                given.json.write_text(json.dumps(results, indent=1) + "\n")
    report(results)
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
