"""Analyse the run that make_run.py makes: both precisions imported, compared, extrapolated and
evaluated.

    python docs/smollm2-run/analyse.py RUN OUT

``RUN`` is the folder of make_run.py. Writes stores, predicted checkpoints, figures and
``results.json`` into ``OUT``; the tables of docs/smollm2-run/README.md are printed at the end.
Accuracy is measured on the 64 pairs that training never saw: greedy, and sampled three times at
temperature 1 with the same seed for every model.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from make_run import last_number_is_right
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from relexkit import (
    Output,
    Prediction,
    TrajectoryStore,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
    spectrum,
)
from relexkit.analysis.figures import plot_spectra
from relexkit.materialize import round_checkpoint

SEED = 11
SAMPLES = 3


def held_out_pairs(seed: int = SEED, count: int = 64) -> list[tuple[int, int]]:
    """The pairs that make_run.py leaves out of training."""
    pairs = [(a, b) for a in range(1, 30) for b in range(1, 30)]
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    z, p = 1.96, successes / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return middle - half, middle + half


@torch.no_grad()
def accuracy(folder: Path, tokenizer) -> dict:
    """Greedy and sampled accuracy of a checkpoint folder, evaluated in float32 arithmetic, and one
    sample of its text.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = held_out_pairs()
    chats = [
        [{"role": "user", "content": f"What is {a} + {b}? Answer with just the number."}]
        for a, b in pairs
    ]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    answers = [str(a + b) for a, b in pairs]
    found = {}
    for name, repeats, options in (
        ("greedy", 1, {"do_sample": False}),
        ("sampled", SAMPLES, {"do_sample": True, "top_k": 0}),
    ):
        torch.manual_seed(SEED)
        right = 0
        for _ in range(repeats):
            out = model.generate(**inputs, max_new_tokens=12, **options)
            texts = tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right += int(sum(last_number_is_right([[{"content": t}] for t in texts], answers)))
        total = repeats * len(pairs)
        found[name] = (right / total, *wilson(right, total))
    return found | {"text": texts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    run, out = options.run, options.out
    results: dict = {"import": {}, "spectrum": {}, "accuracy": {}}
    folders = {"base": run / "base"}
    for source in ("float32", "bfloat16"):
        began = time.perf_counter()
        store = import_checkpoints(run / source, out / f"{source}.zarr", base=run / "base").store
        imported = time.perf_counter()
        matrices = gram(store)
        done = time.perf_counter()
        results["import"][source] = {
            "seconds": imported - began,
            "gram_seconds": done - imported,
            "bytes": store.num_bytes(),
            "checkpoint_bytes": sum(
                p.stat().st_size for p in (run / source).glob("*/model.safetensors")
            ),
        }
        results["spectrum"][source] = describe(matrices)
        plot_spectra(matrices, out / "figures" / source)
        last = int(store.steps[-1])
        half = int(store.steps[len(store.steps) // 2 - 1])
        folders[f"step {half}, {source}"] = run / source / f"checkpoint-{half}"
        folders[f"step {last}, {source}"] = run / source / f"checkpoint-{last}"
        for until, to in ((half, last), (last, 2 * last), (last, 4 * last)):
            for method in ("relex", "two-point"):
                written = extrapolate(
                    store,
                    [to],
                    out / f"{source}-{method}-{until}",
                    Prediction(until=until, method=method),
                )
                folders[f"{method} {until} -> {to}, {source}"] = written[0].folder
        check_checkout(store, run / source / f"checkpoint-{half}", half, out / f"checkout-{source}")
    nearest = extrapolate(
        TrajectoryStore(out / "bfloat16.zarr"),
        [last],
        out / "nearest",
        Prediction(until=half),
        output=Output(rounding="nearest"),
    )
    folders[f"relex {half} -> {last}, bfloat16, nearest rounding"] = nearest[0].folder
    source = run / "float32" / f"checkpoint-{last}"
    folders[f"step {last}, float32 rounded stochastically to bfloat16"] = round_checkpoint(
        source, out / "rounded"
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    for name, folder in folders.items():
        results["accuracy"][name] = accuracy(folder, tokenizer)
        print(name, results["accuracy"][name], flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1))
    show(results)


def check_checkout(store: TrajectoryStore, original: Path, step: int, folder: Path) -> None:
    """A recorded step comes back: exactly, or within the mantissa bits of its delta."""
    checkout(store, step, folder)
    before, after = (
        load_file(original / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    worst = max(float((before[n].float() - after[n].float()).abs().max()) for n in before)
    print(
        f"checkout of step {step}: largest difference {worst:g}"
        f" ({'exact' if store.exact else 'float deltas'})"
    )
    assert worst == 0 or not store.exact


def describe(matrices) -> dict:
    """What the README's table says of a spectrum."""
    whole = spectrum(matrices, scope="global")
    one, null = whole.scopes[0], whole.null
    return {
        "ratios": one.explained_variance_ratio[:3].tolist(),
        "null_ratios": null.explained_variance_ratio[:3].tolist(),
        "r2": float(one.r2[0]),
        "null_r2": float(null.r2[0]),
        "cosine": float(one.update_cosines.mean()),
        "drift": one.drift.tolist(),
        "null_drift": null.drift.tolist(),
        "changed": float(one.changed.mean()),
        "moved": float(one.moved[-1]),
        "unit_moves": one.unit_moves,
    }


def show(results: dict) -> None:
    """Print the accuracy table."""
    table = Table("weights", "greedy (64)", "sampled (192)")
    for name, found in results["accuracy"].items():
        table.add_row(
            name,
            *(
                f"{p:.2f} [{low:.2f}, {high:.2f}]"
                for p, low, high in (found["greedy"], found["sampled"])
            ),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
