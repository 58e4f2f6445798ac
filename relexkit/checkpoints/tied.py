"""Tied weights: an output head that is the input embedding, decided by the tensors and not by a
configuration's flag; and the flag in a written configuration.

Trainers disagree about writing a tied head: Hugging Face folders leave it out, state dicts of FSDP
and DeepSpeed have it. And the flag is wrong in both directions: heads that are written apart, and
heads that have drifted apart while it says tied, or while it says nothing and the model's class
ties by default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint, Run
from relexkit.checkpoints.view import CheckpointView
from relexkit.store import blocks
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.safetensors_io import TensorInfo

_HEAD_OF_EMBEDDING = {
    "embed_tokens.weight": "lm_head.weight",
    "wte.weight": "lm_head.weight",
    "word_embeddings.weight": "lm_head.weight",
    "embed_in.weight": "embed_out.weight",
    "tok_embeddings.weight": "output.weight",
}
"""End of an input embedding's name -> name of the output head beside it."""

_EMBEDDING = re.compile(rf"(.+\.)?({'|'.join(map(re.escape, _HEAD_OF_EMBEDDING))})")
_HEAD = re.compile(r"(\w+\.){0,2}(lm_head|embed_out|output|output_layer)\.weight")
_LANGUAGE_MODEL = re.compile(r".*(CausalLM|LMHeadModel|ConditionalGeneration|ImageTextToText)")


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
    heads = {}
    for checkpoint, other in ((first, base), (base, first)):
        for head, embedding in _pairs(checkpoint.tensors):
            if head in other.tensors or embedding not in other.tensors:
                continue
            tied = not _denies_tie(base) if other is base else equal_tensors(base, head, embedding)
            if tied and head not in heads:
                heads[head] = embedding
    return heads


def tied_tensors(
    run: Run, steps: Sequence[int], base: Checkpoint
) -> tuple[dict[str, str], list[str]]:
    """Head -> embedding where both are equal bit for bit in the base and in every step; and
    anything odd, in words.

    Reads heads and embeddings of all steps, until they differ.
    """
    tied, notes = {}, []
    for head, embedding in _pairs(base.tensors):
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


def split_heads(adapted: Collection[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Head -> embedding, for a base without the head whose adapter changes one of the two.

    A tied head has no tensor of its own, and an adapter changes either the embedding or the head:
    in the merged model they are two tensors.

    Args:
        adapted: names of the tensors that the adapter changes.
        tensors: those of the base.
    """
    heads = {}
    if not any(_HEAD.fullmatch(name) for name in tensors):
        for name in tensors:
            match = _EMBEDDING.fullmatch(name)
            if match is None:
                continue
            named = [n for n in adapted if _HEAD.fullmatch(n)]
            outer = "language_model." if name.startswith("language_model.") else ""
            head = named[0] if named else outer + _HEAD_OF_EMBEDDING[match[2]]
            if named or name in adapted:
                heads[head] = name
    return heads


def with_tie(config: bytes, tensors: Mapping[str, TensorInfo], tied: Mapping[str, str]) -> bytes:
    """``config.json`` saying of written tensors whether head and embedding are one parameter.

    A head that differs from the embedding makes ``tie_word_embeddings`` false, a missing one makes
    it true, unless it is false and something else may be the head; equal ones leave it as it is.

    Args:
        tied: name of a tensor -> name of another that is equal to it.
    """
    try:
        document = json.loads(config)
        tie = _tie(tensors, tied, document)
        if tie is None:
            return config
        places = [document, *(v for v in document.values() if _has_flag(v))]
        if isinstance(document.get("text_config"), dict):
            places.append(document["text_config"])
    except (ValueError, AttributeError, RecursionError):
        return config
    if all(place.get("tie_word_embeddings") is tie for place in places):
        return config
    for place in places:
        place["tie_word_embeddings"] = tie
    return (json.dumps(document, indent=2) + "\n").encode()


def _tie(
    tensors: Mapping[str, TensorInfo], tied: Mapping[str, str], config: Mapping[str, object]
) -> bool | None:
    pairs = _pairs(tensors)
    if pairs:
        same = all(tied.get(h, h) == tied.get(e, e) for h, e in pairs)
        return None if same else False
    embeddings = [name for name in tensors if _EMBEDDING.fullmatch(name)]
    architectures = config.get("architectures")
    kinds = architectures if isinstance(architectures, list) else []
    if len(embeddings) != 1 or not any(_LANGUAGE_MODEL.match(str(kind)) for kind in kinds):
        return None
    shape = tensors[embeddings[0]].shape
    others = any(i.shape == shape for name, i in tensors.items() if name != embeddings[0])
    return None if others or any(_HEAD.fullmatch(name) for name in tensors) else True


def _has_flag(value: object) -> bool:
    return isinstance(value, dict) and "tie_word_embeddings" in value


def _pairs(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, str]]:
    """Heads and embeddings of one shape and dtype."""
    heads = [n for n in tensors if _HEAD.fullmatch(n)]
    embeddings = [n for n in tensors if _EMBEDDING.fullmatch(n)]
    return [(h, e) for h in heads for e in embeddings if h != e and tensors[h] == tensors[e]]


def equal_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Head -> embedding where both are in a checkpoint and equal bit for bit."""
    return {h: e for h, e in _pairs(checkpoint.tensors) if equal_tensors(checkpoint, h, e)}


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
