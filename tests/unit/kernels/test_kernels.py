"""Every kernel against its naive twin: the files ``kernel_*.py`` beside this one, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import own_process

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("kernel_*.py")))
def test_kernel_is_its_twin(name):
    own_process(HERE / name, timeout=900)
