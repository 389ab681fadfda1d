"""python -m igulora.benchmarks.fidelity"""

import sys

from .study import main

sys.exit(main())
