"""The curve of README.md: rewards of sampled training answers, and the trajectory's live
statistics, from a run's log.

python docs/smollm2-grpo/plot.py RUN OUT.png
"""

import sys

import numpy as np
from matplotlib.figure import Figure

from relexkit.analysis import style
from relexkit.trainer.loop.run_log import read_log


def main() -> None:
    entries = read_log(sys.argv[1])
    steps = [entry["step"] for entry in entries]
    with style.styled():
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        rewards = np.array([entry["reward"] for entry in entries])
        left.plot(steps, rewards, ".", alpha=0.5, label="a step")
        window = 5
        smooth = np.convolve(rewards, np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, "-", color="C0", label=f"mean of {window} steps")
        left.set(
            xlabel="optimizer step", ylabel="reward of sampled answers", ylim=(0, 1), title="Reward"
        )
        left.legend(loc="upper left", frameon=False)
        for name, label in (
            ("entropy", "entropy (nats)"),
            ("frac_reward_zero_std", "groups without variance"),
        ):
            right.plot(steps, [entry[name] for entry in entries], label=label)
        right.set(
            xlabel="optimizer step", ylim=(0, None), title="Entropy and groups without variance"
        )
        right.legend(loc="upper right", frameon=False)
        figure.savefig(sys.argv[2], dpi=160)


if __name__ == "__main__":
    main()
