"""The tests of pictures: quiet threads for what draws in this process, and nothing where the library is not."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before the library is imported: OpenMP reads it once

pytest.importorskip("PIL")
