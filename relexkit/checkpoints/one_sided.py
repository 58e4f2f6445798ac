"""Tensors that only the base or only the steps have, and those that a person excludes: kept as in
the base, or left out, and reported; never filled with zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.safetensors_io import TensorInfo

_COMPUTED = r"(^|\.)rotary_emb\.inv_freq$|(^|\.)(position_ids|num_batches_tracked)$"
_BASE_ONLY = re.compile(rf"(^|\.)mtp\.|\.attn\.(masked_)?bias$|{_COMPUTED}")
"""Multi-token prediction, which trainers drop; masks and frequencies that are computed anew."""

_RUN_ONLY = re.compile(rf"^(v_head|value_head|reward_head|critic_head|score)\.|{_COMPUTED}")
"""Heads that only the training needs."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Sides:
    """Which tensors are taken from the base, and which of the steps' own are left out."""

    from_base: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()

    def notes(self) -> list[str]:
        """What a person should know, in words."""
        notes = []
        if self.from_base:
            notes.append(
                f"{_some(self.from_base)} kept as in the base in every step: the steps lack"
                f" {'it' if len(self.from_base) == 1 else 'them'}, or --exclude names"
                f" {'it' if len(self.from_base) == 1 else 'them'}"
            )
        if self.left_out:
            notes.append(f"{_some(self.left_out)} left out: the base has no such tensor")
        return notes


def sides(base: Checkpoint, first: Checkpoint, exclude: Sequence[str]) -> Sides:
    """What to do about tensors of one side only, by name, and about those that match ``exclude``.

    Args:
        exclude: regular expressions, searched for in names.

    Raises:
        RelexkitError: one is not a regular expression, or matches nothing.
    """
    ours, theirs = base.tensors.keys(), first.tensors.keys()
    excluded: set[str] = set()
    for pattern in exclude:
        try:
            matching = {name for name in ours | theirs if re.search(pattern, name)}
        except re.error as error:
            raise RelexkitError(
                f"--exclude {pattern!r} is not a regular expression ({error}); expected one to"
                " search for in names"
            ) from None
        if not matching:
            raise RelexkitError(
                f"--exclude {pattern!r} matches no tensor; the run has"
                f" {', '.join(list(theirs)[:3])}, ..."
            )
        excluded |= matching
    for name in excluded & ours & theirs:
        if base.tensors[name].shape != first.tensors[name].shape:
            raise RelexkitError(
                f"--exclude: {name!r} has shape {list(first.tensors[name].shape)} in the run and"
                f" {list(base.tensors[name].shape)} in the base; expected one shape, since an"
                " excluded tensor keeps the base's values"
            )
    num_layers = _num_layers({**base.files(), **first.files()}.get("config.json", b""))
    unused = {name for name in ours - theirs if _is_unused(name, num_layers)}
    heads = {name for name in theirs - ours if _RUN_ONLY.search(name)}
    return Sides(frozenset((excluded & ours) | unused), frozenset((excluded - ours) | heads))


def _is_unused(name: str, num_layers: int | None) -> bool:
    layer = _LAYER.search(name)
    beyond = num_layers is not None and layer is not None and int(layer[1]) >= num_layers
    return beyond or _BASE_ONLY.search(name) is not None


def _num_layers(config: bytes) -> int | None:
    try:
        document = json.loads(config)
        num_layers = document.get("num_hidden_layers", document.get("n_layer"))
        num_layers = num_layers or document["text_config"]["num_hidden_layers"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return num_layers if isinstance(num_layers, int) else None


class KeptFromBase(CheckpointView):
    """A step with some tensors of the base, and without some of its own.

    Attributes:
        still: the float tensors that are the base's.
    """

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint, one_sided: Sides):
        super().__init__(checkpoint)
        self._base, self._from_base = base, one_sided.from_base
        gone = one_sided.from_base | one_sided.left_out
        self.tensors: Mapping[str, TensorInfo] = {
            **{n: i for n, i in checkpoint.tensors.items() if n not in gone},
            **{n: i for n, i in base.tensors.items() if n in one_sided.from_base},
        }
        self.still = frozenset(
            n for n in one_sided.from_base if base.tensors[n].dtype in FLOAT_DTYPES
        )

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        (self._base if name in self._from_base else self.inner).read_into(name, start, out)


def refuse_exclude(exclude: Sequence[str], steps: str) -> None:
    """Refuse ``--exclude`` for steps that are changes of the base: what they leave alone is its."""
    if exclude:
        raise CheckpointError(
            f"--exclude has no effect on {steps}: what they do not change is the base's; leave it"
            " out"
        )


def _some(names: Collection[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return f"{len(first)} tensor{'s' * (len(first) > 1)} ({', '.join(first[:3])}{more})"
