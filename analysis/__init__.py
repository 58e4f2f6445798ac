"""Figures of what relexkit computes. Uses the library's results and never recomputes them; knows
nothing of the trainer.
"""

from relexkit.registry import Command, Extension

EXTENSION = Extension(
    {
        "report": Command(
            "relexkit.analysis.report",
            "write one self-contained page about a run: advice, claims, figures, commands",
            group="look at a run",
            examples=(
                "run.zarr -o report.html",
                "a/run.zarr -o report.html --compare b/run.zarr best=c/run.zarr",
            ),
        )
    },
    plots={
        "spectrum": "relexkit.analysis.figures:plot_spectra",
        "backtest": "relexkit.analysis.backtest_figures:plot_backtest",
        "demo": "relexkit.analysis.demo_figure:plot_demo",
    },
    drawings="relexkit.analysis.drawings:DRAWINGS",
)
