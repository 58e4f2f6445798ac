"""The log of a run across kills."""

from __future__ import annotations

import json
from functools import partial

from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop.loggers import TensorBoard
from relexkit.trainer.loop.run_log import RunLog, read_log


def events_of(folder, step):
    config = GRPOConfig(model="model", output=str(folder), task="arithmetic")
    return partial(TensorBoard, folder, step, config)


def test_a_resumed_log_has_every_step_once_and_survives_a_cut_line(tmp_path):
    with RunLog(tmp_path, 0, 5, loggers=[events_of(tmp_path, 0)], active=True) as log:
        for step in (1, 2, 3):
            log.write(step, {"reward": step / 10, "live_r2": float("nan")})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    with RunLog(tmp_path, 2, 5, loggers=[events_of(tmp_path, 2)], active=True) as log:
        log.write(3, {"reward": 0.7})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "reward": 0.1, "live_r2": None},
        {"step": 2, "reward": 0.2, "live_r2": None},
        {"step": 3, "reward": 0.7},
    ]
    assert len(list((tmp_path / "events").iterdir())) == 2


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0, 2, loggers=[events_of(tmp_path, 0)], active=True) as log:
        log.write(1, {"reward": 0.25})
        log.write(2, {"reward": 0.5})
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (1, 0.25),
        (2, 0.5),
    ]


def test_only_the_first_process_writes(tmp_path):
    with RunLog(tmp_path, 0, 2, active=False) as log:
        log.write(1, {"reward": 1.0})
        log.say("nothing")
    assert not list(tmp_path.iterdir())
