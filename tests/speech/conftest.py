"""The speech tests: quiet threads for what listens in this process."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before whisper.cpp is imported: OpenMP reads it once
