"""Two workers share the cores of a machine: with several threads each they would mostly wait for one another."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests of threads ask for two
