"""Tied weights: an output head that is the input embedding, decided by the tensors and not by a
configuration's flag.

Trainers disagree about writing a tied head: Hugging Face folders leave it out, state dicts of FSDP
and DeepSpeed have it. And the flag lies in both directions: heads that are written apart, and heads
that have drifted apart while it says tied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint, Run
from relexkit.checkpoints.view import CheckpointView
from relexkit.store import blocks
from relexkit.weights.dtypes import bits_dtype

_INPUT_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


class RunWithHeads:
    """A run whose checkpoints have the heads that ``missing`` names, as the embedding they are tied
    to.
    """

    def __init__(self, run: Run, missing: Mapping[str, str]):
        self._run, self._missing = run, missing
        self.description, self.steps, self.notes, self.left_out = (
            run.description,
            run.steps,
            run.notes,
            run.left_out,
        )

    def checkpoint(self, step: int) -> Checkpoint:
        """Open one step."""
        return with_heads(self._run.checkpoint(step), self._missing)


def with_heads(checkpoint: Checkpoint, missing: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with every head of ``missing`` (head -> embedding) that it lacks."""
    added = {
        head: name
        for head, name in missing.items()
        if head not in checkpoint.tensors and name in checkpoint.tensors
    }
    return (
        CheckpointView(checkpoint, stored={**{n: n for n in checkpoint.tensors}, **added})
        if added
        else checkpoint
    )


def heads_on_one_side(base: Checkpoint, first: Checkpoint) -> dict[str, str]:
    """Head -> embedding where only the base or only the steps have the head, and the other side
    means the embedding.

    A base without a head is tied unless its configuration denies it; steps without one are tied if
    the base's head is its embedding bit for bit. Anything else stays as it is, for the import to
    refuse.
    """
    found = {}
    for checkpoint, other in ((first, base), (base, first)):
        for head, embedding in _pairs(checkpoint):
            if head in other.tensors or embedding not in other.tensors:
                continue
            tied = not _denies_tie(base) if other is base else equal_tensors(base, head, embedding)
            if tied and head not in found:
                found[head] = embedding
    return found


def tied_tensors(
    run: Run, steps: Sequence[int], base: Checkpoint
) -> tuple[dict[str, str], list[str]]:
    """Head -> embedding where both are equal bit for bit in the base and in every step; and what is
    odd, in words.

    Reads heads and embeddings of all steps, until they differ.
    """
    tied, notes = {}, []
    for head, embedding in _pairs(base):
        if equal_tensors(base, head, embedding) and all(
            _equal_at(run, step, head, embedding) for step in steps
        ):
            tied[head] = embedding
        elif _claims_tie(base):
            notes.append(
                f"{head} differs from {embedding} although config.json says they are tied: both are"
                " recorded"
            )
    return tied, notes


def _pairs(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Heads and embeddings of one shape and dtype."""
    tensors = checkpoint.tensors
    heads = [n for n in tensors if n.endswith(_OUTPUT_HEADS)]
    embeddings = [n for n in tensors if n.endswith(_INPUT_EMBEDDINGS)]
    return [(h, e) for h in heads for e in embeddings if h != e and tensors[h] == tensors[e]]


def _equal_at(run: Run, step: int, first: str, second: str) -> bool:
    with closing(run.checkpoint(step)) as checkpoint:
        if (
            checkpoint.tensors.get(first) != checkpoint.tensors.get(second)
            or first not in checkpoint.tensors
        ):
            return False  # the import itself reports it
        return equal_tensors(checkpoint, first, second)


def _flag(base: Checkpoint) -> object:
    try:
        config = json.loads(base.files().get("config.json", b"{}"))
        return config.get(
            "tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings")
        )
    except (ValueError, AttributeError, RecursionError):
        return None


def _denies_tie(base: Checkpoint) -> bool:
    return _flag(base) is False


def _claims_tie(base: Checkpoint) -> bool:
    return _flag(base) is True


def equal_tensors(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """True if two tensors of a checkpoint, of one shape and dtype, are equal bit for bit; reads
    them in blocks.
    """
    info = checkpoint.tensors[first]
    for begin, end in blocks(info.numel):
        pair = [np.empty(end - begin, bits_dtype(info.dtype)) for _ in range(2)]
        checkpoint.read_into(first, begin, pair[0])
        checkpoint.read_into(second, begin, pair[1])
        if not np.array_equal(pair[0], pair[1]):
            return False
    return True
