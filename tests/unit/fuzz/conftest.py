"""Where fuzz tests put their files: hypothesis hands no fixture's value to single examples."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))
    return tmp_path
