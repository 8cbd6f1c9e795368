"""Environment of every test: one process, one thread, no network. Set before vLLM is imported."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_CONFIGURE_LOGGING": "1",
    }
)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

if find_spec("hypothesis"):  # a GPU's machine may lack it
    from hypothesis import settings

    # A busy machine is late; and what CI finds, it must find each time. Nightly runs draw anew.
    settings.register_profile("suite", deadline=None, derandomize=os.environ.get("VLLM_PRUNE_FULL") != "1")
    settings.load_profile("suite")

LONG = (
    "test_soak",
    "test_faults",
    "test_device_path",
    "test_ray_serve",
    "test_train_distributed",
    "test_kernels",
    "test_law1_open_gates",
    "test_public_dms",
    "test_law2_drop_sets",
)
"""Files that take minutes: begun first, lest one process does the last of them while the others wait."""


def with_room(test):
    return test()


# Python keeps frames in pieces of 16 KiB, each mapped when a call reaches it and unmapped when the call ends. Where the calls of
# a hot loop go to and fro across such a border, half of a test's time is spent on that: Triton's interpreter did, below pytest's
# own frames. A frame that asks for a megabyte is given a piece of two, with room for all that it calls.
with_room.__code__ = with_room.__code__.replace(co_stacksize=1 << 17)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        item.runtest = partial(with_room, item.runtest)
