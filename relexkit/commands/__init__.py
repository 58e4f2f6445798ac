"""The commands of relexkit: options, one call, and what it prints."""

from relexkit.registry import Command, Extension

EXTENSION = Extension(
    {
        "import": Command(
            "relexkit.commands.import_run",
            "import a run's checkpoints into a trajectory store; run again to add new steps",
            group="record a run",
            examples=(
                "checkpoints/ -o run.zarr",
                "checkpoints/ -o run.zarr --steps 10:200:10",
                "checkpoints/ -o run.zarr --dry-run",
            ),
        ),
        "watch": Command(
            "relexkit.commands.watch",
            "import checkpoints as they appear, and delete them afterwards if asked to",
            group="record a run",
            examples=(
                "checkpoints/ -o run.zarr",
                "checkpoints/ -o run.zarr --delete-after --idle 600",
            ),
        ),
        "info": Command(
            "relexkit.commands.info",
            "say what is inside a store, or which checkpoints a folder holds",
            group="look at a run",
            examples=("run.zarr", "checkpoints/"),
        ),
        "verify": Command(
            "relexkit.commands.verify",
            "read every chunk of a store and compare it with its checksums",
            group="look at a run",
            examples=("run.zarr", "s3://bucket/run.zarr"),
        ),
        "gram": Command(
            "relexkit.commands.gram",
            "compute the Gram matrices and keep them in the store: the one pass",
            group="look at a run",
            examples=("run.zarr", "run.zarr --pca randomized --components 8"),
        ),
        "spectrum": Command(
            "relexkit.commands.spectrum",
            "principal directions of the updates, beside those of a walk without direction",
            group="look at a run",
            examples=(
                "run.zarr --scope module",
                "run.zarr --scope global --until 100 --plot figures",
                "run.zarr --json",
            ),
        ),
        "linearity": Command(
            "relexkit.commands.linearity",
            "how straight every single weight's path is, beside a walk's; one pass",
            group="look at a run",
            examples=("run.zarr", "run.zarr --scope global --until 100"),
        ),
        "backtest": Command(
            "relexkit.commands.backtest",
            "how every method would have done in the run's own past, and how far to trust it",
            group="look at a run",
            examples=("run.zarr", "run.zarr --method relex drift --until 50 100"),
        ),
        "advise": Command(
            "relexkit.commands.advise",
            "say what to do next with a run, and why",
            group="look at a run",
            examples=("run.zarr", "run.zarr --until 100"),
        ),
        "extrapolate": Command(
            "relexkit.commands.extrapolate",
            "write the predicted checkpoints of future steps",
            group="predict and write checkpoints",
            examples=(
                "run.zarr --to 200 300 -o predicted",
                "run.zarr --to 200 --method drift --until 100 -o predicted",
            ),
        ),
        "checkout": Command(
            "relexkit.commands.checkout",
            "write a recorded step as a checkpoint; step 0 is the base",
            group="predict and write checkpoints",
            examples=("run.zarr --step 100 -o step-100", "run.zarr --step 0 -o base"),
        ),
        "round": Command(
            "relexkit.commands.round",
            "write any checkpoint in another precision, stochastically rounded",
            group="predict and write checkpoints",
            examples=(
                "checkpoint/ --dtype bfloat16 -o rounded",
                "checkpoint/ --dtype float16 --rounding nearest -o rounded",
            ),
        ),
        "completion": Command(
            "relexkit.commands.completion",
            "print a script by which a shell completes commands and options",
            group="other commands",
            examples=("bash >> ~/.bashrc", "zsh >> ~/.zshrc", "fish | source"),
        ),
    }
)
