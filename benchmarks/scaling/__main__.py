"""python -m igulora.benchmarks.scaling"""

import sys

from .curves import main

sys.exit(main())
