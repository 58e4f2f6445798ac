"""The small files beside the weights: configurations, tokenizers, code, markers. A hostile one may
be of any size, and none is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from relexkit.errors import CheckpointError
from relexkit.store import SAFE_FILE_NAME

MAX_BYTES = 100_000_000
"""Largest configuration or tokenizer that is read."""

MAX_OTHER_BYTES = 2**24
"""Largest file that is kept although its name says nothing to us."""

_FOLDERS = ("additional_chat_templates", "custom_generate")
"""Folders below a checkpoint in which transformers looks for files."""

_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|normalizer|chat_template)\.(json|jinja)"
    r"|(.*[_-])?(vocab|tekken|vocab-src|vocab-tgt)\.(json|txt)|(merges|dict)\.txt"
    r"|(byte_maps|emoji|word_shape|word_pronunciation)\.json"
    r"|[^/]*\.(model|tiktoken|spm|vocab|codes|bpe|tokenizer)|additional_chat_templates/.*"
)
_VOCABULARY = re.compile(
    r"tokenizer\.json|(.*[_-])?(vocab|tekken)\.(json|txt)|[^/]*\.(model|tiktoken|spm|vocab|tokenizer)"
)
_PROCESSOR = re.compile(
    r"([^/]*_)?(preprocessor|processor|feature_extractor|audio_tokenizer)_config\.json"
)
_GENERATION = re.compile(r"generation_config\.json|custom_generate/.*")
_CODE = re.compile(r"[^/]*\.py")
_WITH_CODE = re.compile(r"[^/]*\.(py|json|txt)")
_SETS = (_TOKENIZER, _PROCESSOR, _GENERATION, _CODE)
_NAMED = re.compile(
    "|".join(f"(?:{kind.pattern})" for kind in (*_SETS[:3], re.compile(r"config\.json")))
)
_NOT_KEPT = re.compile(  # state of trainers and of other tools, text for people, scripts to be run
    r".*\.index\.json|(trainer|optimizer|scheduler|training)_?\w*\.json|.*_results\.json"
    r"|adapter_config\.json|fsdp_config\.json|lora_train_meta\.json|zero_to_fp32\.py|setup\.py"
    r"|(README|LICENSE|NOTICE|requirements|events).*"
)


def read_small(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a file of at most ``most`` bytes.

    Raises:
        CheckpointError: it is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = bytearray()
            while len(content) <= most and (piece := file.read(min(2**20, most + 1))):
                content += piece  # one read of most + 1 would take that much memory at once
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > most:
        raise CheckpointError(
            f"{path}: has more than {most:,} bytes; expected a small file: remove or replace it"
        )
    return bytes(content)


def is_model_file(name: str, *, with_code: bool) -> bool:
    """True for what a loader may need beside the weights, by its path below the checkpoint.

    Code, and what only code would read, if the configuration names code (``with_code``).
    """
    return (
        SAFE_FILE_NAME.fullmatch(name) is not None
        and _NOT_KEPT.fullmatch(name) is None
        and bool(_NAMED.fullmatch(name) or (with_code and _WITH_CODE.fullmatch(name)))
    )


def model_files(folder: Path) -> dict[str, bytes]:
    """What a loader may need beside the weights of a folder, by path below it; nothing if it does
    not exist.

    Configurations, tokenizer, chat templates, processor; and where one of them names code
    (``auto_map``), the code and the files beside it, which are kept and never executed.

    Raises:
        CheckpointError: one that is known by its name has more than ``MAX_BYTES``; others of more
            than ``MAX_OTHER_BYTES`` are left out.
    """
    places = [folder, *(folder / name for name in _FOLDERS)]
    paths = {
        path.relative_to(folder).as_posix(): path
        for place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.is_file()
    }
    files = {n: read_small(p) for n, p in paths.items() if is_model_file(n, with_code=False)}
    if any(b'"auto_map"' in content for name, content in files.items() if "config" in name):
        for name, path in paths.items():
            wanted = name not in files and is_model_file(name, with_code=True)
            if wanted and path.stat().st_size <= MAX_OTHER_BYTES:
                files[name] = read_small(path)
    return files


def merged_files(base: Mapping[str, bytes], run: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a run, and those of its base that the run does not have.

    What belongs together comes from one side: the tokenizer with its chat templates, the processor,
    the generation configuration, the code.
    """
    taken = dict(run)
    for kind in _SETS:
        ours, theirs = _of_kind(kind, run), _of_kind(kind, base)
        whole = bool(ours) and (
            kind is not _TOKENIZER
            or _of_kind(_VOCABULARY, ours) != []
            or _of_kind(_VOCABULARY, theirs) == []
        )
        if not whole:
            taken = {name: content for name, content in taken.items() if name not in ours}
            taken |= {name: base[name] for name in theirs}
    single = [name for name in base if not any(kind.fullmatch(name) for kind in _SETS)]
    return {**{name: base[name] for name in single}, **taken}


def _of_kind(kind: re.Pattern[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if kind.fullmatch(name)]
