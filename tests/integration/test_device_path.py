"""The serve path of a GPU in a real engine, under Triton's interpreter: see ``device_laws.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import own_process

pytest.importorskip("triton")


@pytest.mark.timeout(1300)
def test_laws_on_the_device_path():
    own_process(Path(__file__).with_name("device_laws.py"), timeout=1200)
