"""``relexkit report``: one self-contained HTML page of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from relexkit import Compute, RelexkitError
from relexkit.analysis.page import Subject, build_page
from relexkit.analysis.run_names import name_runs
from relexkit.extension import (
    Observed,
    TrajectoryStore,
    attempts,
    describe_steps,
    described,
    observe,
    past_the_end,
    progress_bar,
    say,
    write_file,
)
from relexkit.options import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``relexkit report``."""

    store: str = option("store", metavar="RUN.zarr")
    """the trajectory store, a folder or a URL"""
    out: Path = option("-o", "--out", metavar="FILE.html")
    """the page to write"""
    until: int | None = option(default=None, metavar="STEP")
    """use only steps up to this one"""
    sweep: Path | None = option(default=None, metavar="FILE.json")
    """what relexkit sweep --json printed: adds its results"""
    compare: tuple[str, ...] = option(default=(), metavar="[NAME=]OTHER.zarr")
    """other runs to compare with, by their paths or by names of your own"""


def answer(options: Options) -> Path:
    """Write the page; returns where it is."""
    with progress_bar() as progress:
        return write_report(
            options.store,
            options.out,
            until=options.until,
            compare=options.compare,
            sweep=options.sweep,
            progress=progress,
        )


def run(options: Options) -> None:
    """Write the page and say where it is."""
    path = answer(options)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def write_report(
    store: str | Path,
    out: str | Path,
    *,
    until: int | None = None,
    compare: Sequence[str] = (),
    sweep: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the page of a run to ``out``, replacing it; returns its path.

    One pass over the deltas if the store has no Gram matrices yet, else no weights are read. A
    store with few steps or without metrics gives a shorter page that says what is missing.

    Raises:
        RelexkitError: the store has no steps, or its folder cannot be read.
    """
    named = name_runs([store, *compare])
    name = next(iter(named))
    opened = TrajectoryStore(named[name])
    if not len(opened.steps):
        raise RelexkitError(
            f"{store}: holds no steps yet; record or import some, then ask for the report again"
        )
    for line in past_the_end(opened.steps, until):
        say(line)
    run, others = (
        _observed(opened, progress).until(until),
        {
            other: _observed(TrajectoryStore(path), progress)
            for other, path in named.items()
            if other != name
        },
    )
    sweep_result = _read_sweep(sweep)
    subject = _subject(opened, name, named[name], run)
    text = build_page(subject, run, others=others, sweep=sweep_result, progress=progress)
    path = Path(out)
    write_file(path, text.encode())
    return path


def _observed(store: TrajectoryStore, progress: Callable[[str, int, int], None] | None) -> Observed:
    return observe(store, compute=Compute(progress=progress))


def _read_sweep(path: str | Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        result = json.loads(Path(path).read_text())
    except ValueError:
        result = None
    if (
        not isinstance(result, dict)
        or not {"candidates", "baseline", "recommendation"} <= result.keys()
    ):
        raise RelexkitError(
            f"{path}: is not what relexkit sweep --json prints; run the sweep with --json again"
        )
    return result


def _subject(store: TrajectoryStore, name: str, path: str, run: Observed) -> Subject:
    attributes, config = store.attributes, _config(store)
    source = str(attributes["source"])
    trained = re.fullmatch(r"GRPO of (.+?)(?: on (\S+))?", source)
    parameters = int(run.gram.num_parameters.sum())
    base = str(attributes["base"]["description"])
    known = trained[1] if trained else config.get("_name_or_path") or ""
    kinds = [str(kind) for kind in config.get("architectures") or []]
    words = [Path(str(known)).name, *kinds, f"{_count(parameters)} parameters"]
    kept = "bit for bit" if store.exact else f"deltas with {store.mantissa_bits} mantissa bits"
    facts = [
        ("store", path),
        ("steps", describe_steps(run.gram.steps)),
        ("parameters", f"{parameters:,} in {len(run.gram.names)} tensors"),
        ("recorded", f"{kept}, by relexkit {attributes['relexkit_version']}"),
        ("source", source),
        ("base", base),
    ]
    decided = attempts(store)
    if decided:
        facts.append(("jumps", described(decided)))
    changed = _last_change(path)
    if changed:
        facts.append(("last step recorded", changed))
    return Subject(
        name=name,
        path=path,
        model=", ".join(word for word in words if word),
        task=(trained[2] or "") if trained else "",
        date=f"{datetime.now():%Y-%m-%d}",
        facts=facts,
    )


def _config(store: TrajectoryStore) -> dict[str, Any]:
    """The model's ``config.json``, empty if the store has none that can be read."""
    try:
        config = json.loads(store.files().get("config.json", b"{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _count(number: int) -> str:
    """A number of parameters: ``1.26 M``."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _last_change(path: str) -> str:
    """The day on which a local store got its last step; empty for others."""
    steps = Path(path) / "steps"
    if not steps.is_dir():
        return ""
    newest = max(file.stat().st_mtime for file in steps.rglob("*"))
    return f"{datetime.fromtimestamp(newest):%Y-%m-%d}"
