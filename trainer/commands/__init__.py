"""The commands of the trainer, which it adds to ``relexkit``."""

from relexkit.registry import Command, Extension

EXTENSION = Extension(
    {
        "train": Command(
            "relexkit.trainer.commands.train",
            "train a model by GRPO, recording its trajectory",
            group="train and evaluate",
            examples=("config.yaml", "config.yaml --learning-rate 1e-5 --max-steps 300"),
        ),
        "evaluate": Command(
            "relexkit.trainer.commands.evaluate",
            "accuracy of models on a task, with intervals: folders, or steps of a store",
            group="train and evaluate",
            examples=(
                "model/ --task arithmetic",
                "run.zarr --step 50 100 --to 200 --task arithmetic",
            ),
        ),
        "sweep": Command(
            "relexkit.trainer.commands.sweep",
            "try predictions on a task, stop bad ones early, and recommend",
            group="train and evaluate",
            examples=(
                "run.zarr --task arithmetic --to 150 200",
                "run.zarr --to 150 200 --until 100 --write predicted",
            ),
        ),
        "probe": Command(
            "relexkit.trainer.commands.probe",
            "how linear the log-probabilities of texts are; generate from extrapolated logits",
            group="train and evaluate",
            examples=(
                "run.zarr --task arithmetic --to 200",
                "run.zarr --generate 12+30= --steps 50 100 --at 200",
            ),
        ),
        "g2d": Command(
            "relexkit.trainer.commands.g2d",
            "preference pairs from a run's rollouts, DPO from its recorded steps, evaluation",
            group="train and evaluate",
            examples=("RUN --steps 50 100 -o pairs", "RUN --steps 50 -o pairs --config dpo.yaml"),
        ),
        "tokens": Command(
            "relexkit.trainer.commands.tokens",
            "which tokens carry the update, from a log of rollouts",
            group="train and evaluate",
            examples=("RUN", "RUN --until 100 --top 50"),
        ),
        "demo": Command(
            "relexkit.trainer.commands.demo",
            "train a small model, record, analyse, extrapolate: the whole story in minutes",
            group="train and evaluate",
            examples=("", "-o demo-run"),
        ),
    }
)
