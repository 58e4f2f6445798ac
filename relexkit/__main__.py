"""``python -m relexkit`` is the ``relexkit`` command."""

import sys

from relexkit.cli import main

sys.exit(main())
