"""The one option that lets a command run code that comes with a model."""

from __future__ import annotations

import argparse


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust-remote-code``, for a command that loads models or tokenizers."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that lies beside the model (auto_map); never done otherwise",
    )
