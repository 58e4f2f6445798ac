"""What a recorder decides when it opens a store: which tensors move, who owns which parts, what
lies beside the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from relexkit.checkpoints.small_files import model_files
from relexkit.errors import RelexkitError, StoreError
from relexkit.store import TrajectoryStore, describe_steps


def refuse_existing(path: str | Path) -> None:
    """Refuse a place with a store, but not one whose creation was interrupted."""
    with contextlib.suppress(StoreError):
        there = TrajectoryStore(path)
        raise RelexkitError(
            f"{path}: a store with {describe_steps(there.steps)} exists there; resume from one of"
            " them or choose another path"
        )


def give_back_memory() -> None:
    """Return to the system what writing the base has freed; glibc would keep it, a fifth of a small
    model.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def refuse_other_base(different: str | None, store: TrajectoryStore) -> None:
    """Refuse a model whose base has a tensor that is ``different`` from the store's."""
    if different is not None:
        raise RelexkitError(
            f"{different!r} of the model's base differs from the base in {store.path}; expected the"
            " same base: load it as it was when the store was made, with the adapter beside it and"
            " not merged"
        )


def files_of(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """What transformers saves beside the weights: configuration, generation configuration,
    tokenizer, and the code of a model that has its own.
    """
    config = getattr(model, "config", None)
    with tempfile.TemporaryDirectory() as folder:
        if config is not None and getattr(model, "_auto_class", None) is not None:
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=config)
        for owner in (config, getattr(model, "generation_config", None), tokenizer):
            if owner is not None and hasattr(owner, "save_pretrained"):
                owner.save_pretrained(folder)
        return model_files(Path(folder))


def still_names(
    names: list[str], frozen: set[str], include: Sequence[str], exclude: Sequence[str]
) -> frozenset[str]:
    """The tensors that keep the base's values in the store."""
    try:
        wanted = [
            n for n in names if not include or any(re.search(pattern, n) for pattern in include)
        ]
        wanted = [n for n in wanted if not any(re.search(pattern, n) for pattern in exclude)]
    except re.error as error:
        raise RelexkitError(
            f"{error.pattern!r} is not a regular expression ({error}); expected one to search in"
            " names"
        ) from None
    moving = frozenset(wanted) - frozen
    if not moving:
        raise RelexkitError(
            f"include {list(include)} and exclude {list(exclude)} leave no trained tensor; the"
            f" model has {', '.join(names[:3])}, ..."
        )
    return frozenset(names) - moving


def check_still(store: TrajectoryStore, still: Collection[str]) -> None:
    """The parts of a continued store hold either tensors that move or tensors that do not."""
    for part, spec in enumerate(store.layout.parts):
        inside = store.layout.segments_in(part) if spec.moves else []
        kinds = {segment.tensor.name in still for segment in inside}
        moved = kinds == {True} and store.encoding(part).touched(store, part)
        if len(kinds) == 2 or moved:
            name = store.layout.segments_in(part)[0].tensor.name
            raise RelexkitError(
                f"tensors near {name!r} were recorded otherwise in {store.path}; expected the same"
                " include, exclude and frozen parameters as when it was made"
            )
