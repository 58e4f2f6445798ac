"""Predictions and stores for others: cards that the hub reads, uploads, a recipe for mergekit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.gram_matrix.compute.settings import DEFAULT
from relexkit.materialize.planning import plan
from relexkit.predict.extrapolators import step_text
from relexkit.predict.prediction import PLAIN, Prediction
from relexkit.store import TrajectoryStore, describe_steps

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def base_repository(base: Mapping[str, Any], config: bytes | None = None) -> str | None:
    """The hub repository of a run's base, from its description or from ``config.json``; None if
    neither names one.
    """
    described = str(base["description"])
    cached = _CACHED.search(described)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    known = json.loads(config).get("_name_or_path") if config else None
    for name in (described.removeprefix("hf://").partition("@")[0], known):
        if isinstance(name, str) and REPOSITORY.fullmatch(name) and not Path(name).exists():
            return name
    return None


def model_index(name: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``model-index`` of a card from what ``relexkit evaluate --json`` prints, a single model of
    it.

    Raises:
        RelexkitError: it is not such a document, or has several models.
    """
    models = evaluation.get("models", [])
    if "task" not in evaluation or len(models) != 1:
        raise RelexkitError(
            f"an evaluation of {len(models)} models is not one of this folder; expected what"
            " relexkit evaluate --json prints for the folder alone"
        )
    metrics = []
    for kind in ("greedy", "sampled"):
        if kind in models[0]:
            low, high = models[0][kind]["interval"]
            metrics.append(
                {
                    "type": "accuracy",
                    "name": f"accuracy ({kind}), 95 % {low:.3f} to {high:.3f}",
                    "value": models[0][kind]["accuracy"],
                }
            )
    data = {"name": evaluation["task"], "type": evaluation["task"], "split": evaluation["split"]}
    task = {"type": "text-generation"}
    return [{"name": name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]


def push(
    source: str | Path,
    repository: str,
    *,
    evaluation: str | Path | None = None,
    private: bool = False,
) -> str:
    """Upload a written checkpoint as a model, or a store as a data set; returns the address.

    The repository is made if there is none. The card's licence is taken from the card of the base
    where that is on the hub. The account is that of ``huggingface_hub`` (``hf auth login``).

    Args:
        repository: ``ORG/NAME``.
        evaluation: a file of what ``relexkit evaluate --json`` printed for this checkpoint, which
            becomes the card's ``model-index``.

    Raises:
        RelexkitError: nothing of that kind is at ``source``, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(source)
    if not REPOSITORY.fullmatch(repository):
        raise RelexkitError(f"{repository!r} is not a repository; expected ORG/NAME")
    is_store = (folder / "zarr.json").is_file()
    if not is_store and not (folder / "config.json").is_file():
        raise RelexkitError(f"{folder}: is neither a store nor a checkpoint folder; give one")
    kind = "dataset" if is_store else "model"
    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        inside = folder.name if is_store else None
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            path_in_repo=inside,
            commit_message=f"{folder.name} by relexkit",
        )
        card = _store_card(folder) if is_store else _full_card(api, folder, evaluation)
        if card is not None:
            api.upload_file(
                path_or_fileobj=card.encode(),
                path_in_repo="README.md",
                repo_id=repository,
                repo_type=kind,
                commit_message="Card",
            )
    except (HfHubHTTPError, OSError) as error:
        raise RelexkitError(f"{repository}: the hub refused: {error}") from error
    return str(address)


def _full_card(api: Any, folder: Path, evaluation: str | Path | None) -> str | None:
    """The card of a folder with the licence of its base and the results of an evaluation; None if
    it has no card, or it stays as it is.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    path = folder / "README.md"
    if not path.is_file():
        return None
    card = ModelCard(path.read_text(), ignore_metadata_errors=True)
    known = card.data.to_dict()
    base = known.get("base_model")
    if base and "license" not in known:
        try:
            base_card = api.model_info(base).card_data
        except HfHubHTTPError:  # a private base, or one that is gone
            base_card = None
        if base_card is not None and base_card.get("license"):
            known["license"] = base_card.get("license")
    if evaluation is not None:
        try:
            document = json.loads(Path(evaluation).read_text())
        except ValueError:
            raise RelexkitError(
                f"{evaluation}: is not JSON; give what evaluate --json prints"
            ) from None
        known["model-index"] = model_index(folder.name, document)
    return f"---\n{front_matter(known)}---\n{card.text}"


def front_matter(values: Mapping[str, Any]) -> str:
    """Metadata of a card as YAML, of which JSON is a subset; empty entries are left out."""
    return "".join(
        f"{name}: {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in values.items()
        if value
    )


def _store_card(folder: Path) -> str:
    store = TrajectoryStore(folder)
    base = store.attributes["base"]
    held = "with the base" if store.reference is None else "with its base by reference"
    about = front_matter({"tags": ["relexkit", "trajectory"], "pretty_name": folder.name})
    return (
        f"---\n{about}---\n\n# Trajectory of a training run\n\n{describe_steps(store.steps)} of a"
        f" model of {store.layout.num_parameters:,} parameters, {held}, in one Zarr group"
        f" `{folder.name}` that [relexkit](https://pypi.org/project/relexkit) reads.\n\n| | |\n|---"
        f"|---|\n| base | {base['description']} (sha256 `{base['sha256']}`) |\n| source |"
        f" {store.attributes['source']} |\n\n```\nhf download ORG/NAME --repo-type dataset"
        f" --local-dir .\nrelexkit advise {folder.name}\n```\n"
    )


def mergekit_config(
    store: TrajectoryStore,
    to: float,
    prediction: Prediction = PLAIN,
    *,
    checkpoint: str = "checkpoint-{step}",
    base: str | None = None,
) -> str:
    """A prediction with one weight for each step as a ``task_arithmetic`` recipe of mergekit, YAML.

    mergekit then computes the same sum ``theta_0 + sum_t a_t (theta_t - theta_0)`` from whole
    checkpoints; weights below 1e-9 of the largest are left out.

    Args:
        checkpoint: path or repository of a recorded step, with ``{step}`` in it.
        base: of the base; its description in the store if None.

    Raises:
        ExtrapolationError: see ``predict_weights``.
        RelexkitError: tensors have different weights, as with scope tensor: ask for scope global.
    """
    (planned,) = plan(store, [to], prediction, DEFAULT)
    weights = planned.weights
    moved = weights[weights.any(axis=1)]
    if len(moved) and not np.allclose(moved, moved[0], rtol=1e-9, atol=0):
        raise RelexkitError(
            "tensors have weights of their own, which mergekit's recipe cannot say; ask for"
            ' Prediction(scope="global") or a method of step numbers alone'
        )
    shared = moved[0] if len(moved) else np.zeros(weights.shape[1])
    used = np.flatnonzero(np.abs(shared) > 1e-9 * np.abs(shared).max(initial=0.0))
    named = base or store.attributes["base"]["description"]
    lines = [
        f"# {planned.provenance['method']} at step {step_text(to)}, by relexkit",
        "merge_method: task_arithmetic",
        f"base_model: {json.dumps(named)}",
        "models:",
    ]
    for row in used:
        path = checkpoint.format(step=int(store.steps[row]))
        lines += [f"  - model: {json.dumps(path)}", "    parameters:"]
        lines.append(f"      weight: {float(shared[row])!r}")
    return "\n".join([*lines, "parameters:", "  normalize: false", "dtype: float32", ""])


def card_metadata(store: TrajectoryStore, relation: str, tags: Sequence[str]) -> str:
    """The front matter of a written checkpoint's card: base, its relation to it, and tags."""
    base = base_repository(store.attributes["base"], store.files().get("config.json"))
    return front_matter(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "base_model": base,
            "base_model_relation": relation if base else None,
            "tags": list(tags),
        }
    )
