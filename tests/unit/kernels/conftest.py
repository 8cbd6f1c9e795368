"""Kernels run under Triton's interpreter where there is no GPU: it must be chosen before the first is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "kernels"))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
