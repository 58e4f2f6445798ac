"""The errors that a user can meet. Each message says what was wrong, what was expected and what to
do, in one line.
"""

import unicodedata


class RelexkitError(Exception):
    """Base of every stated error; the command line prints its message and exits with status 1."""


class CheckpointError(RelexkitError):
    """A checkpoint or a folder of checkpoints cannot be used as it is."""


class StoreError(RelexkitError):
    """A trajectory store is missing, damaged, locked, or not what the call needs."""


class ExtrapolationError(RelexkitError):
    """A method cannot predict from these steps with these options."""


def printable(text: str) -> str:
    """``text`` with everything escaped that could steer a terminal: control characters but the new
    line and the tab, marks of direction, and halves of surrogate pairs, which cannot be encoded.
    """
    return "".join(_escaped(c) if unicodedata.category(c)[0] == "C" else c for c in text)


def _escaped(character: str) -> str:
    if character in "\n\t":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
