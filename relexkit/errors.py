"""The errors that a user can meet. Each message says what was wrong, what was expected and what to
do, in one line.
"""


class RelexkitError(Exception):
    """Base of every stated error; the command line prints its message and exits with status 1."""


class CheckpointError(RelexkitError):
    """A checkpoint or a folder of checkpoints cannot be used as it is."""


class StoreError(RelexkitError):
    """A trajectory store is missing, damaged, locked, or not what the call needs."""


class ExtrapolationError(RelexkitError):
    """A method cannot predict from these steps with these options."""
