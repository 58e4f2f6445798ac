"""``relexkit completion``: a script by which a shell completes commands and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relexkit.options import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``relexkit completion``."""

    shell: Literal["bash", "zsh", "fish"] = option("shell")
    """the shell to complete in"""


def run(options: Options) -> None:
    """Print the script."""
    import argcomplete

    print(argcomplete.shellcode(["relexkit"], shell=options.shell))
