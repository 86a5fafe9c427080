"""For all tests: one thread each. The models are tiny, and threads that wait for one another cost more than that."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
