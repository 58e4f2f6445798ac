"""Rows of a data set as people have it: JSON Lines, JSON, CSV, Parquet, and folders of
``datasets``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relexkit import RelexkitError

_KINDS = "JSON Lines, JSON, CSV, TSV, Parquet, or a folder of datasets"


def read_rows(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file, or of one split of a folder, as dictionaries.

    Args:
        split: of a folder that ``datasets`` has saved with several, or with Parquet files that are
            named after their split.

    Raises:
        RelexkitError: it cannot be read; where a row is to blame it is named.
    """
    if path.is_dir():
        return _read_folder(path, split)
    if split is not None:
        raise RelexkitError(f"{path}: is a file and has no split {split!r}; give its folder")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        # Lines end at line feeds only: U+2028, U+2029 and U+0085 may stand inside of JSON strings.
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix in (".csv", ".tsv"):
            return _read_table(text, "\t" if path.suffix == ".tsv" else ",")
        rows = list(_json_rows(path, text))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise RelexkitError(f"{path}: cannot be read ({error}); expected {_KINDS}") from None
    return rows


def split_names(path: Path) -> list[str]:
    """The splits of a folder, empty where it has none."""
    if (path / "dataset_dict.json").is_file():
        return list(json.loads((path / "dataset_dict.json").read_text())["splits"])
    return list(_parquet_files(path))


def _json_rows(path: Path, text: str) -> Iterator[Any]:
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def _read_table(text: str, delimiter: str) -> list[dict[str, Any]]:
    """Every cell as it is written: an answer such as ``007`` is not made a number."""
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _read_folder(path: Path, split: str | None) -> list[dict[str, Any]]:
    names = split_names(path)
    if split is None and len(names) == 1:
        split = names[0]
    if names and split not in names:
        raise RelexkitError(
            f"{path}: has no split {split!r}; expected one of {', '.join(names)}"
            if split is not None
            else f"{path}: has the splits {', '.join(names)}; name one, as `split: {names[0]}`"
        )
    try:
        if not names:
            return _saved_rows(path)
        assert split is not None
        if (path / "dataset_dict.json").is_file():
            return _saved_rows(path / split)
        import pyarrow.parquet

        files = _parquet_files(path)[split]
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RelexkitError(f"{path}: cannot be read ({error}); expected {_KINDS}") from None


def _saved_rows(folder: Path) -> list[dict[str, Any]]:
    """What ``datasets`` has saved to disk: Arrow streams, named in a state."""
    import pyarrow

    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{state.name} is missing and there are no Parquet files")
    rows: list[dict[str, Any]] = []
    for entry in json.loads(state.read_text())["_data_files"]:
        with pyarrow.memory_map(str(folder / entry["filename"])) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return rows


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files by the split that begins their name, as on the Hub: ``test-00000-of-00001``."""
    by_split: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        by_split.setdefault(file.stem.split("-")[0], []).append(file)
    return by_split
