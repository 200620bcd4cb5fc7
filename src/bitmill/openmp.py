"""How long threads of OpenMP wait actively for their next work.

By default they spin for many milliseconds (libgomp) or 200 (libomp). A process with other work then gets the cores
only when the scheduler takes them from threads that do nothing, and two processes can take ten times as long as
one. Here they spin about as long as the time between two operations of torch, and sleep then.
"""

from __future__ import annotations

import os
import sys

# The user's settings of active waiting, any of which wins over ours.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SHORT = {
    "GOMP_SPINCOUNT": "1000",  # rounds of libgomp, tens of microseconds in all; by default 300,000
    "KMP_BLOCKTIME": "1",  # milliseconds of libomp and libiomp5, whole ones; by default 200
}


def limit_spinning() -> None:
    """Let the threads of OpenMP sleep soon, in this process and those that it starts.

    The runtimes read their settings when torch loads them, so nothing is changed once it is imported, nor where
    the user has set one of `WAITING`.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    os.environ.update(_SHORT)
