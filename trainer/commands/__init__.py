"""The commands of the trainer, which it adds to ``relexkit``."""

from relexkit.registry import Command, Extension

EXTENSION = Extension(
    {
        "train": Command(
            "relexkit.trainer.commands.train", "train a model by GRPO, recording its trajectory"
        ),
        "evaluate": Command(
            "relexkit.trainer.commands.evaluate",
            "accuracy of models on a task, with intervals: folders, or steps of a store",
        ),
        "sweep": Command(
            "relexkit.trainer.commands.sweep",
            "try predictions on a task, stop bad ones early, and recommend",
        ),
        "probe": Command(
            "relexkit.trainer.commands.probe",
            "how linear the log-probabilities of texts are; generate from extrapolated logits",
        ),
        "g2d": Command(
            "relexkit.trainer.commands.g2d",
            "preference pairs from a run's rollouts, DPO from its recorded steps, evaluation",
        ),
        "tokens": Command(
            "relexkit.trainer.commands.tokens",
            "which tokens carry the update, from a log of rollouts",
        ),
        "demo": Command(
            "relexkit.trainer.commands.demo",
            "train a small model, record, analyse, extrapolate: the whole story in minutes",
        ),
    }
)
