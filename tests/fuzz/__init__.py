"""Random valid calls of every public function against the oracle: `python -m tests.fuzz --help`."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[1])
if TESTS not in sys.path:  # pytest has put it there already
    sys.path.insert(0, TESTS)
