"""Entry point of `python -m regulate`."""

import sys

from .cli import main

sys.exit(main())
