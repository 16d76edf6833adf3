"""A busy machine on purpose: loops that keep cores from whoever is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTLE = 0.2
"""Seconds until the loops have started and the scheduler has spread them."""
# The loop ends by itself too, should whoever started it be killed.
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n for _ in range(10**6): pass"


@contextmanager
def loaded(loops: int) -> Iterator[None]:
    """Run this many busy loops beside the body, each a process of its own; none is left behind."""
    started = []
    try:
        started = [
            subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(os.getpid())]) for _ in range(loops)
        ]
        if loops:
            time.sleep(SETTLE)
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
