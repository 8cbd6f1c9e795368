"""Makes the package importable without an installation, and keeps property tests quick and repeatable."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

settings.register_profile("gates", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("gates")
