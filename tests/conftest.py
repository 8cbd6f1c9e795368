"""Environment of every test: one process, one thread, no network. Set before vLLM is imported."""

from __future__ import annotations

import os
import sys
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


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
