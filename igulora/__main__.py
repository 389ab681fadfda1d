"""``python -m igulora`` is the ``igulora`` command."""

import sys

from .cli import main

sys.exit(main())
