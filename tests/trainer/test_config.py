"""Options of a training run: what is accepted, and what is said of the rest."""

from __future__ import annotations

import pytest

from relexkit import RelexkitError
from relexkit.trainer.config import G2DConfig, GRPOConfig, build_config, dump_config, load_config

NEEDED = {"model": "m", "task": "t", "output": "o"}


def test_a_file_and_options_together_and_back(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ntask: {name: arithmetic, digits: 4}\noutput: o\nlearning_rate: 1e-6\nbeta: 1\n"
    )
    config = load_config(
        path, {"max_steps": "7", "beta": "0.5", "epsilon_high": "0.28", "bf16": "true"}
    )
    assert (config.learning_rate, config.max_steps, config.beta) == (1e-6, 7, 0.5)
    assert (config.epsilon, config.upper_epsilon, config.bf16) == (0.2, 0.28, True)
    assert config.task == {"name": "arithmetic", "digits": 4}
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"learning_rat": 1.0},
            r"option 'learning_rat' is unknown; did you mean 'learning_rate'\?",
        ),
        ({"max_steps": 1.5}, "max_steps: 1.5 does not fit .*valid integer"),
        ({"max_steps": "many"}, "max_steps: 'many' does not fit"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' does not fit .*valid number"),
        (
            {"gradient_checkpointing": "perhaps"},
            "gradient_checkpointing: 'perhaps' does not fit .*boolean",
        ),
        (
            {"loss_type": "ppo"},
            "loss_type: 'ppo' does not fit .*'grpo', 'bnpo', 'dr_grpo' or 'dapo'",
        ),
        ({"max_steps": 0}, "max_steps: 0 is too small; expected more than 0"),
        ({"temperature": 0.0}, "temperature: 0.0 is too small; expected more than 0"),
        ({"beta": -0.1}, "beta: -0.1 is too small; expected at least 0"),
        ({"num_generations": 1}, "num_generations: 1 leaves nothing to compare"),
        (
            {"generation_batch_size": 12},
            "generation_batch_size: 12 does not split .* expected a multiple of 8",
        ),
        (
            {"steps_per_generation": 3},
            "generation_batch_size: 64 does not split into 3 steps .* multiple of 24",
        ),
        ({"precision": "bfloat16"}, "precision: 'bfloat16' does not fit .*'bfloat16_nearest'"),
        (
            {"precision": "bfloat16_nearest", "bf16": True},
            "bf16: is for precision float32 only",
        ),
        ({"delta": 1.1}, "delta: 1.1 would cap below the clip range"),
        ({"mantissa_bits": 24}, "mantissa_bits: 24 is out of range"),
        ({"lr_scheduler_type": "wavy"}, "lr_scheduler_type: 'wavy' is unknown; expected constant"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RelexkitError, match=message):
        build_config(NEEDED | options)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(
        RelexkitError,
        match="output: is missing; expected a value for it in the file or as --output",
    ):
        build_config({"model": "m", "task": "t"})
    with pytest.raises(RelexkitError, match=r"nowhere.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RelexkitError, match="holds no options"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(RelexkitError, match="is not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_derived_numbers():
    config = GRPOConfig(
        **NEEDED,
        generation_batch_size=48,
        num_generations=6,
        steps_per_generation=4,
        num_iterations=3,
    )
    assert (config.num_prompts, config.generation_interval) == (8, 12)


@pytest.mark.parametrize("kind", [GRPOConfig, G2DConfig])
def test_the_help_says_of_every_option_what_it_means_and_what_it_takes(kind):
    import argparse
    import dataclasses

    from relexkit.trainer.commands.configured import add_options
    from relexkit.trainer.config import option_groups, option_meanings

    names = [field.name for field in dataclasses.fields(kind)]
    assert set(option_meanings(kind)) == set(names)
    groups = option_groups(kind)
    assert [field.name for _, fields in groups for field in fields] == names
    assert max(len(fields) for _, fields in groups) <= 14
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    shown = " ".join(parser.format_help().split())
    for heading, _ in groups:
        assert f"{heading}: --" in shown
    for name in names:
        assert f"--{name} " in shown
    assert "--lr_scheduler_type TEXT" in shown
    assert "--device {auto,cpu,cuda}" in shown
