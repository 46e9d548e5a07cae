"""The worker's tests load the model in this process, too, to compare: quiet threads for it."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before llama_cpp is imported: OpenMP reads it once
