"""Calls from Python against the tensors that were written, and against the commands."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import HEAD, Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import relexkit as rk
from relexkit.cli import commands, main
from relexkit.registry import extensions

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
_NOT_THE_SAME_NAME = {"import": "import_checkpoints"}


def deltas(run: Run, name: str) -> np.ndarray:
    return np.stack([run.delta(step, name) for step in run.steps])


def test_every_command_is_a_function(two_runs) -> None:
    for name in commands().keys() - {"completion"}:  # for shells alone
        assert callable(getattr(rk, _NOT_THE_SAME_NAME.get(name, name)))
        assert _NOT_THE_SAME_NAME.get(name, name) in rk.__all__
    added = {name for extension in extensions() for name in extension.commands}
    assert added == {"report", "train", "evaluate", "sweep", "probe", "g2d", "tokens", "demo"}
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = rk.no_such_thing


@pytest.mark.parametrize("name", ["spectrum", "backtest", "advise", "linearity"])
def test_defaults_are_those_of_the_command(name: str, two_runs, capsys) -> None:
    """The function's answer without options is the command's answer without options."""
    path = two_runs[2] / "a.zarr"
    assert main([name, str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = getattr(rk, name)(path)
    if name == "spectrum":
        assert [s["name"] for s in printed["scopes"]] == [s.name for s in found.scopes]
        walk = found.whole.expected["first"]
        assert printed["whole"]["first"]["walk"] == pytest.approx(walk, rel=1e-12)
    elif name == "backtest":
        assert printed["methods"] == list(found.methods)
        assert printed["grid"][-1]["relative_error"] == found.grid[-1].relative_error
    elif name == "advise":
        assert printed["headline"] == found.headline
        assert printed["reasons"] == list(found.reasons)
    else:
        assert [g["name"] for g in printed["groups"]] == list(found.names)
        np.testing.assert_array_equal(printed["walk"], found.null)
        np.testing.assert_array_equal([g["counts"] for g in printed["groups"]], found.counts)


@pytest.mark.parametrize("step", [0, 1, 7, 12])
def test_a_tensors_delta_and_weights_are_what_was_written(step: int, two_runs) -> None:
    run, _, folder = two_runs
    opened = rk.open(folder / "a.zarr")
    for name in (EMBEDDING, NORM, "model.layers.1.mlp.down_proj.weight"):
        expected = run.weights[step][name].float().numpy()
        np.testing.assert_array_equal(opened.weights(name, step), expected)
        delta = opened.delta(name, step)
        assert delta.dtype == np.float32
        np.testing.assert_array_equal(delta.reshape(-1), run.delta(step, name).astype(np.float32))
    np.testing.assert_array_equal(opened.delta(HEAD, step), opened.delta(EMBEDDING, step))


def test_a_float_store_gives_its_own_delta(two_runs, tmp_path: Path) -> None:
    run, _, _ = two_runs
    rk.import_checkpoints(
        run.source, tmp_path / "f.zarr", base=run.base, encoding="float", mantissa_bits=10
    )
    for step in (3, 12):
        found = rk.open(tmp_path / "f.zarr").delta(EMBEDDING, step).reshape(-1)
        expected = run.delta(step, EMBEDDING)
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=0)
        assert np.abs(found).max() > 0


def test_an_unknown_tensor_is_refused_with_names(two_runs) -> None:
    opened = rk.open(two_runs[2] / "a.zarr")
    with pytest.raises(rk.RelexkitError, match=r"'norm' is not a float tensor .* as model.*norm"):
        opened.delta("norm", 1)
    with pytest.raises(rk.StoreError, match="step 99 is not recorded"):
        opened.weights(NORM, 99)


def test_directions_are_right_singular_vectors_of_either_norm(two_runs) -> None:
    run, _, folder = two_runs
    found = rk.directions(folder / "a.zarr", count=2, scope="tensor")
    left, singular, right = np.linalg.svd(deltas(run, EMBEDDING), full_matrices=False)
    signs = np.sign(left[-1])
    for k in (1, 2):
        unit = found.vector(EMBEDDING, k).reshape(-1)
        assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(unit, signs[k - 1] * right[k - 1], atol=1e-5)
        task = found.vector(EMBEDDING, k, norm="task").reshape(-1)
        expected = left[-1, k - 1] * singular[k - 1] * right[k - 1]
        np.testing.assert_allclose(task, expected, atol=1e-5 * singular[0])
    np.testing.assert_array_equal(found.vectors(1)[EMBEDDING], found.vector(EMBEDDING, 1))
    with pytest.raises(rk.RelexkitError, match="direction 3: there are 2"):
        found.vector(EMBEDDING, 3)
    with pytest.raises(rk.RelexkitError, match="norm 'l2' is unknown; choose one of unit, task"):
        found.vector(EMBEDDING, 1, norm="l2")


def test_written_directions_say_their_norm(two_runs, tmp_path: Path) -> None:
    from safetensors import safe_open

    found = rk.directions(two_runs[2] / "a.zarr", count=1)
    for norm in ("task", "unit"):
        (path,) = found.write(tmp_path / norm, norm=norm)
        with safe_open(path, "pt") as file:
            assert file.metadata()["norm"].startswith(f"{norm}: ")
    length = np.linalg.norm(load_file(tmp_path / "unit" / "direction-1.safetensors")[EMBEDDING])
    assert length == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("given", ["folder", "state_dict"])
def test_projection_of_a_checkpoint(given: str, two_runs) -> None:
    run, other, folder = two_runs
    checkpoint = other.folders[12] if given == "folder" else other.weights[12]
    found = rk.project(folder / "a.zarr", checkpoint, count=2, scope="layer")
    group = found.groups.index("layer 0")
    names = [n for n in run.weights[0] if "layers.0." in n]
    matrix = np.hstack([deltas(run, n) for n in names])
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    pieces = [(other.weights[12][n].double() - run.weights[0][n].double()).numpy() for n in names]
    delta = np.concatenate([piece.reshape(-1) for piece in pieces])
    expected = (right[:2] @ delta) * np.sign(left[-1, :2])
    np.testing.assert_allclose(found.coefficients[group], expected, rtol=1e-4)
    assert found.norms[group] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    inside = (expected**2).sum() / (delta**2).sum()
    assert found.inside[group] == pytest.approx(inside, rel=1e-4)


def test_the_runs_own_last_step_projects_on_its_coefficients(two_runs) -> None:
    run, _, folder = two_runs
    found = rk.directions(folder / "a.zarr", count=3, scope="layer")
    seen = rk.project(found, run.folders[12])
    for row, group in enumerate(seen.groups):
        parts = found.groups[group]
        if len(parts.singular_values) >= 3:
            np.testing.assert_allclose(
                seen.coefficients[row], parts.coefficients[-1, :3], rtol=1e-3, atol=1e-6
            )


def test_a_checkpoint_of_another_model_is_refused(two_runs) -> None:
    run, _, folder = two_runs
    lacking = {n: t for n, t in run.weights[3].items() if n != NORM}
    with pytest.raises(rk.RelexkitError, match=r"lacks tensor 'model.norm.weight'"):
        rk.project(folder / "a.zarr", lacking)
    cut = run.weights[3] | {NORM: torch.zeros(3)}
    with pytest.raises(rk.RelexkitError, match=r"has shape \[3\]; expected \[8\]"):
        rk.project(folder / "a.zarr", cut)


def test_directions_of_two_runs_compared(two_runs) -> None:
    run, other, folder = two_runs
    found = rk.compare_directions(folder / "a.zarr", folder / "b.zarr", count=2, scope="tensor")
    row = found.groups.index(EMBEDDING)
    both = [np.linalg.svd(deltas(r, EMBEDDING), full_matrices=False) for r in (run, other)]
    vectors = [right[:2] * np.sign(left[-1, :2])[:, None] for left, _, right in both]
    np.testing.assert_allclose(found.cosines[row], vectors[0] @ vectors[1].T, atol=1e-5)
    assert found.chance[row] == pytest.approx(1 / np.sqrt(53 * 8))
    same = rk.compare_directions(folder / "a.zarr", folder / "a.zarr", count=1)
    known = same.cosines[np.isfinite(same.cosines)]
    np.testing.assert_allclose(known, 1, atol=1e-5)


def test_update_cosines(two_runs) -> None:
    run, _, folder = two_runs
    matrix = np.hstack([deltas(run, n) for n in run.weights[0] if n != HEAD])
    updates = np.diff(matrix, axis=0, prepend=0)
    unit = updates / np.linalg.norm(updates, axis=1, keepdims=True)
    found = rk.update_cosines(folder / "a.zarr")["global"]
    # Gram matrices are float32 products, and an update a small difference of them
    np.testing.assert_allclose(found, unit @ unit.T, atol=1e-4)


def coast(steps: np.ndarray, target: float) -> np.ndarray:
    """Beyond the last step by the last update."""
    weights = np.zeros(len(steps))
    weights[-2:] = (steps[-1] - target, target - steps[-2])
    return weights / (steps[-1] - steps[-2])


def test_a_function_of_ones_own_is_a_method(two_runs, tmp_path: Path) -> None:
    run, _, folder = two_runs
    path = folder / "a.zarr"
    found = rk.backtest(path, method=[coast, "two-point"], until=[6])
    assert found.methods == ("hold", "coast", "two-point")
    names = [n for n in run.weights[0] if n != HEAD]
    flat = np.hstack([deltas(run, n) for n in names])
    predicted = coast(np.arange(1, 7), 9) @ flat[:6]
    row = next(r for r in found.grid if r.method == "coast" and r.target == 9)
    expected = np.linalg.norm(predicted - flat[8]) / np.linalg.norm(flat[8])
    assert row.relative_error == pytest.approx(expected, rel=1e-4)  # from float32 products

    output = rk.Output(dtype="float32")
    (written,) = rk.extrapolate(path, [20], tmp_path, rk.Prediction(method=coast), output=output)
    tensor = load_file(written.folder / "model.safetensors")[EMBEDDING]
    moved = coast(np.arange(1, 13), 20) @ deltas(run, EMBEDDING)
    base = run.weights[0][EMBEDDING].double().numpy().reshape(-1)
    np.testing.assert_allclose(tensor.numpy().reshape(-1), base + moved, atol=1e-5)
    assert "coast" in (written.folder / "README.md").read_text()

    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    rk.apply(path, model, coast(rk.open(path).steps, 20))
    loaded = model.state_dict()[EMBEDDING].numpy().reshape(-1)
    np.testing.assert_allclose(loaded, base + moved, atol=1e-5)


def test_wrong_weights_of_a_function_are_refused(two_runs) -> None:
    path = two_runs[2] / "a.zarr"
    with pytest.raises(rk.ExtrapolationError, match=r"<lambda> gave weights of shape \[\]"):
        rk.predict_weights(path, [20], rk.Prediction(method=lambda steps, target: 1.0))
    with pytest.raises(rk.RelexkitError, match=r"or \[12\] for all tensors alike"):
        rk.apply(path, torch.nn.Linear(1, 1), np.zeros((2, 12)))


def test_metrics_are_a_frame_with_the_steps(two_runs, monkeypatch) -> None:
    opened = rk.open(two_runs[2] / "a.zarr")
    frame = opened.metrics
    assert list(frame.index) == list(range(1, 13))
    assert frame.index.name == "step"
    import builtins

    real = builtins.__import__

    def without_pandas(name: str, *rest: object) -> object:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(rk.RelexkitError, match=r"needs the package pandas; install it with: pip"):
        _ = opened.metrics


def answers(path: Path) -> list[rk.Result]:
    run = rk.open(path)
    return [
        run,
        rk.advise(run),
        rk.backtest(run),
        rk.compare_directions(run, run, scope="layer"),
        rk.directions(run, scope="layer"),
        rk.forecast(run),
        rk.gram(run),
        rk.info(run),
        rk.linearity(run),
        rk.observe(run),
        rk.project(run, run.store.path and {n: run.weights(n, 3) for n in run.tensors}),
        rk.spectrum(run, scope="layer"),
    ]


def test_every_answer_shows_draws_and_becomes_a_frame(two_runs) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for answer in answers(two_runs[2] / "a.zarr"):
        kind = type(answer).__name__
        rows = answer.rows()
        assert rows, kind
        frame = answer.to_frame()
        assert list(frame.columns) == list(rows[0]), kind
        assert len(frame) == len(rows)
        text, page = repr(answer), answer._repr_html_()
        assert text.startswith(f"{kind}, {len(rows)} rows\n")
        assert len(text) < 6000
        assert page.count("<tr>") == min(len(rows), 20) + 1
        axes = answer.plot()
        assert answer.plot(axes) is axes
        axes.figure.canvas.draw()
        pyplot.close(axes.figure)


def test_html_escapes_what_the_run_is_called() -> None:
    shown = rk.Table({}, [{"<b>": "<script>"}], ["a < b"])._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "a &lt; b" in shown


def test_commands_of_other_packages_take_their_options(two_runs, tmp_path: Path) -> None:
    path = str(two_runs[2] / "a.zarr")
    page = rk.report(path, out=tmp_path / "r.html", until=8)
    assert page == tmp_path / "r.html"
    assert "8 steps from 1 to 8" in page.read_text()
    with pytest.raises(TypeError, match=r"relexkit.report takes no colour; expected .*until"):
        rk.report(path, out=tmp_path / "r.html", colour="red")
    with pytest.raises(TypeError, match=r"relexkit.report: .*--until.*invalid int"):
        rk.report(path, out=tmp_path / "r.html", until="late")
    with pytest.raises(TypeError, match=r"required"):
        rk.report(path)


def test_until_past_the_end_warns_as_the_commands_do(two_runs, tmp_path: Path) -> None:
    run = rk.open(two_runs[2] / "a.zarr")
    last, known = run.steps[-1], rk.observe(run)
    line = f"^--until 500: the run ends with step {last}; all of it is used$"
    late = rk.Prediction(until=500)
    for ask in (
        lambda: rk.spectrum(run, until=500),
        lambda: rk.spectrum(known, until=500),
        lambda: rk.update_cosines(known.gram, until=500),
        lambda: rk.linearity(run, until=500),
        lambda: rk.advise(run, until=500),
        lambda: rk.directions(run, until=500),
        lambda: rk.predict_weights(run, [600], late),
        lambda: rk.extrapolate(run, [600], tmp_path / "out", late),
        lambda: rk.extrapolate(run, [700], tmp_path / "out", prediction=late),
    ):
        with pytest.warns(UserWarning, match=line) as said:
            ask()
        assert len(said) == 1
    rk.spectrum(run, until=int(last))  # a warning would be an error here


def test_functions_of_a_run_take_a_path_and_an_open_store(two_runs, tmp_path: Path) -> None:
    path = two_runs[2] / "a.zarr"
    for number, source in enumerate((str(path), path, rk.open(path), rk.TrajectoryStore(path))):
        folder = rk.checkout(source, 3, tmp_path / str(number))
        assert (folder / "model.safetensors").is_file()
        rk.verify(source)
        assert rk.spectrum(source, scope="global").scopes[0].num_parameters > 0
    assert re.match(r"\(store.*step", str(inspect.signature(rk.checkout)))


def test_an_answer_without_rows_says_its_sentences_alone() -> None:
    answer = rk.Table({}, [], ["Keep training."])
    assert repr(answer) == "Table\nKeep training."
    assert repr(rk.Table({}, [{"step": 1}])).splitlines()[0] == "Table, 1 rows"
