"""Unit tests build Hugging Face models after engines of this process may have run, whichever file came before."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def hugging_face_as_it_was() -> None:
    """vLLM's Transformers backend changes the classes of families that it served in place: load their modules again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name and module is not None:
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            foreign = any(base.__module__.startswith("vllm.") for cls in classes for base in cls.__mro__)
            if foreign:
                importlib.reload(module)
