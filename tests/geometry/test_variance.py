"""The variance report as a table, against numpy and scikit-learn's names."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from strategies import gram_of, trajectory

from relexkit import spectrum
from relexkit.geometry.variance import write_csv

STEPS = np.array([1, 2, 4, 7, 20, 21, 33, 50])


def test_csv_has_a_row_for_every_scope(tmp_path: Path) -> None:
    walk = trajectory("walk", STEPS, 300, seed=1).deltas
    line = trajectory("line", STEPS, 40, seed=2).deltas
    result = spectrum(gram_of({"walk": walk, "line": line, "still": np.zeros((8, 5))}, STEPS))
    write_csv(result, tmp_path / "variance.csv")
    lines = (tmp_path / "variance.csv").read_text().splitlines()
    rows = {row["name"]: row for row in csv.DictReader(lines)}
    assert list(rows) == ["walk", "line", "still"]
    singular = np.linalg.svd(walk, compute_uv=False)
    ratios = singular**2 / (singular**2).sum()
    for k in range(3):
        assert np.isclose(float(rows["walk"][f"singular_values_{k + 1}"]), singular[k], rtol=1e-9)
        assert np.isclose(
            float(rows["walk"][f"explained_variance_ratio_{k + 1}"]), ratios[k], rtol=1e-9
        )
    for share in (90, 95, 99):
        assert int(rows["walk"][f"n_components_{share}"]) == int(
            np.argmax(ratios.cumsum() >= share / 100) + 1
        )
    total = (walk**2).sum() + (line**2).sum()
    assert np.isclose(float(rows["line"]["energy_share"]), (line**2).sum() / total)
    assert rows["line"]["explained_variance_ratio_2"] == ""
    assert rows["still"]["n_components_90"] == rows["still"]["ratio_error"] == ""
    assert float(rows["walk"]["ratio_error"]) < 1e-5
