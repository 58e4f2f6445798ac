"""The ``relexkit`` command, and ``python -m relexkit``: signals first, then everything else."""

from __future__ import annotations

from relexkit.interrupts import end_at_once_on_signals

end_at_once_on_signals()


def command() -> int:
    """Run the command of this process; returns its exit status, unless a signal ends it."""
    import os
    import sys

    from relexkit.cli import complete, main

    if "_ARGCOMPLETE" in os.environ:
        complete()
    status = main()
    if status > 128:  # threads may still be at work on what nobody waits for any more
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    import sys

    sys.exit(command())
