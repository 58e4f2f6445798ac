"""The variance report as rows: what ``spectrum`` says about every scope, for spreadsheets and data
frames.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from relexkit.geometry.spectrum import ScopeSpectrum, Spectrum

SHARES = (90, 95, 99)
"""Shares of the variance, in percent, for which the number of directions is reported."""


def variance_row(scope: ScopeSpectrum, num_directions: int = 3) -> dict[str, Any]:
    """One scope, in the names of scikit-learn's PCA; ratios, singular values and R² of the first
    directions.
    """
    row: dict[str, Any] = {
        "name": scope.name,
        "num_parameters": scope.num_parameters,
        "energy_share": scope.energy_share,
        **{f"n_components_{share}": scope.num_directions(share / 100) for share in SHARES},
    }
    for name in ("explained_variance_ratio", "singular_values", "r2"):
        values = getattr(scope, name)
        row |= {
            f"{name}_{k + 1}": float(values[k]) if k < len(values) else None
            for k in range(num_directions)
        }
    return {**row, "ratio_error": scope.ratio_error, "angle_error": scope.angle_error}


def write_csv(result: Spectrum, path: str | Path) -> None:
    """Write a row for every scope; an empty cell is a number that does not exist."""
    rows = [variance_row(scope) for scope in result.scopes]
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None or v != v else v for k, v in row.items()} for row in rows
        )
