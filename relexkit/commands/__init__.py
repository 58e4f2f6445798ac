"""The commands of relexkit: options, one call, and what it prints."""

from relexkit.registry import Command, Extension

EXTENSION = Extension(
    {
        "import": Command(
            "relexkit.commands.import_run",
            "import a run's checkpoints into a trajectory store; run again to add new steps",
        ),
        "watch": Command(
            "relexkit.commands.watch",
            "import checkpoints as they appear, and delete them afterwards if asked to",
        ),
        "info": Command(
            "relexkit.commands.info",
            "say what is inside a store, or which checkpoints a folder holds",
        ),
        "verify": Command(
            "relexkit.commands.verify",
            "read every chunk of a store and compare it with its checksums",
        ),
        "gram": Command(
            "relexkit.commands.gram",
            "compute the Gram matrices and keep them in the store: the one pass",
        ),
        "spectrum": Command(
            "relexkit.commands.spectrum",
            "principal directions of the updates, beside those of a walk without direction",
        ),
        "linearity": Command(
            "relexkit.commands.linearity",
            "how straight every single weight's path is, beside a walk's; one pass",
        ),
        "backtest": Command(
            "relexkit.commands.backtest",
            "how every method would have done in the run's own past, and how far to trust it",
        ),
        "advise": Command("relexkit.commands.advise", "say what to do next with a run, and why"),
        "extrapolate": Command(
            "relexkit.commands.extrapolate", "write the predicted checkpoints of future steps"
        ),
        "checkout": Command(
            "relexkit.commands.checkout",
            "write a recorded step as a checkpoint; step 0 is the base",
        ),
        "round": Command(
            "relexkit.commands.round",
            "write any checkpoint in another precision, stochastically rounded",
        ),
    }
)
