"""Entry point of `python -m regulate`."""

import sys

from .tools.cli import main

sys.exit(main())
